"""Paired rounds: every contender takes its turn in each round, so that ratios compare neighbours in time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from contenders import BASELINE, Contender
from cuda_harness import OnCuda
from harness import OnCpu, Spread, Turn
from workloads import Workload

Place = Callable[[Workload, set[torch.dtype]], OnCpu | OnCuda]
Show = Callable[[str, str], object]


def measure(
    place: Place, workload: Workload, contenders: Sequence[Contender], rounds: Iterable[int], show: Show
) -> dict[str, Any]:
    """All contenders on one workload. One that raises takes no further part, and its row says why.

    Args:
        rounds: their numbers, at least 0, which warms up and does not count, and 1.
        show: is told before each turn which round and contender it is.
    """
    bench = place(workload, {c.dtype for c in contenders})
    turns: dict[str, list[Turn]] = {c.id: [] for c in contenders}
    memory: dict[str, dict[str, Any]] = {}
    failed = {c.id: c.limit for c in contenders if len(workload.shapes) > c.most_tensors}
    for round_ in rounds:
        for c in contenders[:: 1 if round_ % 2 else -1]:
            show(f"{workload.id}, round {round_}", c.id)
            if c.id in failed:
                continue
            try:
                turn = bench.turn(c)
                if round_ == 0:
                    memory[c.id] = bench.memory(c)
                else:
                    turns[c.id].append(turn)
            except Exception as error:
                failed[c.id] = reason(error)
    baseline = None if BASELINE in failed else turns.get(BASELINE)
    measured = {name for name, taken in turns.items() if taken and name not in failed}
    return {
        "id": workload.id,
        "title": workload.title,
        "elements": workload.elements,
        "tensors": len(workload.shapes),
        "contenders": [
            {"name": c.id, "failed": failed[c.id]}
            if c.id in failed
            else {"name": c.id, **figures(c, workload, turns[c.id], baseline), **memory[c.id]}
            for c in contenders
        ],
        "pairs": [
            {"name": c.id, "than": other, "ratio": ratio(turns[other], turns[c.id])}
            for c in contenders
            for other in c.than
            if {c.id, other} <= measured
        ],
    }


def profile(workload: Workload, contenders: Sequence[Contender], measured: dict[str, Any]) -> None:
    """Adds to the rows of a measurement on a GPU what the profiler says about one step."""
    bench = OnCuda(workload, {c.dtype for c in contenders})
    for c, row in zip(contenders, measured["contenders"], strict=True):
        if "failed" in row:
            continue
        try:
            seen = bench.profile(c)
        except Exception as error:
            row["profile_failed"] = reason(error)
            continue
        ceiling = c.bytes * workload.elements / (1e9 * row["ceiling_GB_per_s"]["median"])
        row["launches"] = seen["launches"]
        row["kernel_ms"] = spread([1e3 * seen["kernel_seconds"]])
        row["kernel_share_of_ceiling"] = spread([ceiling / seen["kernel_seconds"]])


def reason(error: Exception) -> str:
    """The first line of what went wrong."""
    return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0][:300]


def figures(
    contender: Contender, workload: Workload, turns: list[Turn], baseline: list[Turn] | None
) -> dict[str, Any]:
    """What follows from the turns of a contender."""
    touched = contender.bytes * workload.elements
    of_danlu = [turn for turn in turns if turn.kernel is not None]
    row = {
        "touched_bytes_per_parameter": contender.bytes,
        "ms": spread(1e3 * turn.step for turn in turns),
        "ratio": ratio(baseline, turns) if baseline else None,
        "GB_per_s": spread(touched / turn.step / 1e9 for turn in turns),
        "ceiling_GB_per_s": spread(touched / turn.ceiling / 1e9 for turn in turns),
        "share_of_ceiling": spread(turn.ceiling / turn.step for turn in turns),
        "host_bound": any(turn.host_bound for turn in turns),
        "host_us_per_tensor": spread(1e6 * turn.host / len(workload.shapes) for turn in turns),
    }
    if of_danlu:
        row["kernel_ms"] = spread(1e3 * turn.kernel for turn in of_danlu)
        row["kernel_share_of_ceiling"] = spread(turn.ceiling / turn.kernel for turn in of_danlu)
    return row


def ratio(slower: list[Turn], faster: list[Turn]) -> dict[str, float]:
    """Of times in the same round."""
    return spread(a.step / b.step for a, b in zip(slower, faster, strict=True))


def spread(sample: Iterable[float]) -> dict[str, float]:
    return dataclasses.asdict(Spread.of(list(sample)))
