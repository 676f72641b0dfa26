"""The host's work around a step: making a plan, a step of all parameters, steps of one at a time.

    python bench/plans.py              AdamW over 10 and 5,000 tensors of 64 elements, some 20 seconds

CPU time of one thread in microseconds for each tensor: medians over the rounds with quartiles. Parts are
`danlu.part.Part`, whose time should not depend on how many tensors there are.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence

import torch

import danlu
from danlu.part import Part
from danlu.plan import Plan
from harness import Model, Spread, positive
from workloads import Workload

COUNTS = (10, 5000)
WAYS = ("making a plan", "a step of all", "steps of one")


def main(arguments: Sequence[str] | None = None, counts: Sequence[int] = COUNTS) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", metavar="N", type=positive, default=9, help="default: %(default)s")
    options = parser.parse_args(arguments)
    from rich.console import Console  # as in grad_norm.py
    from rich.table import Table

    torch.set_num_threads(1)
    shown = Table("tensors", *WAYS, title="us of the host for each tensor")
    for count, spreads in measure(counts, options.rounds).items():
        shown.add_row(f"{count:,}", *(f"{s.median:.2f} ({s.low:.2f}-{s.high:.2f})" for s in spreads))
    Console().print(shown)


def measure(counts: Sequence[int], rounds: int) -> dict[int, list[Spread]]:
    """Of each count all ways, in turn."""
    ways = {count: ways_of_work(count) for count in counts}
    taken: dict[int, list[list[float]]] = {count: [[] for _ in WAYS] for count in counts}
    for _ in range(rounds + 1):
        for count in counts:
            repeats = max(1, max(counts) // count)  # as many tensors of each
            for way, seconds in zip(ways[count], taken[count], strict=True):
                start = time.process_time()
                for _ in range(repeats):
                    way()
                seconds.append((time.process_time() - start) / (repeats * count))
    return {count: [Spread.of([1e6 * t for t in s[1:]]) for s in taken[count]] for count in counts}


def ways_of_work(count: int) -> tuple[Callable[[], object], ...]:
    model = Model(Workload("plans", "tensors of 64 elements", [(64,)] * count), torch.float32)
    model.hold_gradients()
    optimizer = danlu.AdamW(model.parameters)
    parts = [Part(optimizer, [p]) for p in model.parameters]

    def one_at_a_time() -> None:
        for part in parts:
            part.step()

    return lambda: Plan(optimizer), optimizer.step, one_at_a_time


if __name__ == "__main__":
    main()
