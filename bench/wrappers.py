"""What wrappers add to a step: their own pass, beside the ceiling for its bytes and the optimizer's step.

`python bench/step_time.py --wrappers` runs it. Of each wrapper around AdamW the pass alone is timed; all take
their turn in each round, and the bandwidth ceiling of as many bytes comes right after each turn.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from rich.table import Table

import danlu
from harness import STEPS_PER_TURN, BandwidthCeiling, Model, time_steps
from rounds import spread
from workloads import Workload


@dataclasses.dataclass(frozen=True)
class Pass:
    """A wrapper, and what its pass reads and writes of every fp32 element."""

    id: str
    make: Callable[[torch.optim.Optimizer], Any]
    bytes: int
    written: int  # arrays
    every: str  # which steps make it


PASSES = [
    Pass("accumulation", lambda opt: danlu.GradientAccumulation(opt, 1_000_000), 12, 1, "gradient"),
    Pass("lookahead", lambda opt: danlu.Lookahead(opt, k=5), 16, 2, "5th step"),
    Pass("ema", lambda opt: danlu.EMA(opt), 12, 1, "step"),
]


def measure(workload: Workload, rounds: int, show: Callable[[str, str], object]) -> dict[str, Any]:
    """Milliseconds and shares of the bandwidth ceiling; the first round warms up."""
    model, bandwidth = Model(workload, torch.float32), BandwidthCeiling(workload.elements)
    model.hold_gradients()
    turns: dict[str, list[tuple[float, float, float]]] = {one.id: [] for one in PASSES}
    for round_ in range(rounds + 1):
        for one in PASSES:
            show(f"{workload.id}, round {round_}", one.id)
            optimizer = danlu.AdamW(model.parameters)
            wrapper = one.make(optimizer)
            wrapper.step()
            optimizer.step()
            wrapper._pass.step()
            step = time_steps(optimizer.step, lambda: None, STEPS_PER_TURN)
            seconds = time_steps(wrapper._pass.step, lambda: None, STEPS_PER_TURN)
            ceiling = bandwidth.seconds(one.bytes * workload.elements, one.written)
            if round_ > 0:
                turns[one.id].append((seconds, ceiling, step))
    return {
        "id": workload.id,
        "title": workload.title,
        "passes": [
            {
                "name": one.id,
                "bytes_per_parameter": one.bytes,
                "every": one.every,
                "ms": spread(1e3 * seconds for seconds, _, _ in turns[one.id]),
                "share_of_ceiling": spread(ceiling / seconds for seconds, ceiling, _ in turns[one.id]),
                "share_of_adamw": spread(seconds / step for seconds, _, step in turns[one.id]),
            }
            for one in PASSES
        ],
    }


def table(measured: dict[str, Any]) -> Table:
    found = Table(
        "pass", "once a", "bytes", "ms", "of the ceiling", "of AdamW's step", title=measured["title"]
    )
    for row in measured["passes"]:
        cells = [row["name"], row["every"], str(row["bytes_per_parameter"]), f"{row['ms']['median']:.1f}"]
        for name in ("share_of_ceiling", "share_of_adamw"):
            s = row[name]
            cells.append(f"{s['median']:.0%} ({s['low']:.0%}-{s['high']:.0%})")
        found.add_row(*cells)
    return found
