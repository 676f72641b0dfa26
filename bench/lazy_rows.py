"""Steps of an embedding of which few rows have a gradient: danlu.Lazy against the step of all rows.

    python bench/lazy_rows.py          128,256 x 2,048 in fp32, 4,096 rows in the gradient, 5 GB

Milliseconds are medians over the rounds with quartiles. Ratios compare turns of one round: with the same
rule's step on a dense gradient, and with the memory's speed, loops that read the gradient and update in place
what else the step has to touch.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

import danlu
from danlu import _cpu
from harness import BandwidthCeiling, positive, time_steps
from rounds import spread

if TYPE_CHECKING:
    from rich.table import Table

OPTIMIZERS = (danlu.Lion, danlu.AdamW)
SHAPE, LISTED = (128_256, 2048), 4096  # of the embedding of Llama 3.2 1B
STEPS_PER_TURN = 2
LISTED_STEPS_PER_TURN = 20  # some milliseconds each, of which a busy machine's scheduler takes as many


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in dict(rows=SHAPE[0], columns=SHAPE[1], listed=LISTED, rounds=7).items():
        parser.add_argument(
            f"--{name}", metavar="N", type=positive, default=default, help="default: %(default)s"
        )
    parser.add_argument("--threads", metavar="N", type=positive, default=torch.get_num_threads())
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    from rich.console import Console  # only here: a measurement on a GPU goes without

    Console().print(table(measure((options.rows, options.columns), options.listed, options.rounds)))


def measure(shape: tuple[int, int], listed: int, rounds: int) -> dict[str, Any]:
    """Of each rule and each way to step: milliseconds, how many times as fast as all rows, share of the
    memory's speed.
    """
    rows = [
        {"optimizer": optimizer.__name__, **row}
        for optimizer in OPTIMIZERS
        for row in of_rule(optimizer, shape, listed, rounds)
    ]
    return {"title": f"{listed:,} of {shape[0]:,} rows of {shape[1]:,} elements", "ways": rows}


def table(measured: dict[str, Any]) -> Table:
    from rich.table import Table

    shown = Table(
        "rule", "step", "ms", "faster than all rows", "of the memory's speed", title=measured["title"]
    )
    formats = {
        "ms": "{:.1f} ({:.1f}-{:.1f})",
        "ratio": "{:.2f} ({:.2f}-{:.2f})",
        "share": "{:.0%} ({:.0%}-{:.0%})",
    }
    for row in measured["ways"]:
        spreads = (
            text.format(*(row[name][x] for x in ("median", "low", "high"))) for name, text in formats.items()
        )
        shown.add_row(row["optimizer"], row["step"], *spreads)
    return shown


def of_rule(
    optimizer: type[danlu.FusedOptimizer], shape: tuple[int, int], listed: int, rounds: int
) -> list[dict[str, Any]]:
    turns = Turns(optimizer, shape, listed)
    seconds: dict[str, list[float]] = {name: [] for name in turns.ways}
    ceilings: dict[str, list[float]] = {name: [] for name in turns.ways}
    for _ in range(rounds + 1):
        for name, (gradients, step, read, updated) in turns.ways.items():
            take = turns.taking(gradients)
            count = LISTED_STEPS_PER_TURN if name.startswith("rows, listed") else STEPS_PER_TURN
            seconds[name].append(time_steps(step, take, count))
            ceilings[name].append(turns.ceiling(read, updated))
    all_rows = seconds[ALL_ROWS][1:]
    return [
        {
            "step": name,
            "ms": spread(1e3 * t for t in times[1:]),
            "ratio": spread(a / t for a, t in zip(all_rows, times[1:], strict=True)),
            "share": spread(c / t for c, t in zip(ceilings[name][1:], times[1:], strict=True)),
        }
        for name, times in seconds.items()
    ]


ALL_ROWS = "all rows"
LISTS = 8  # of other rows: those of the last step are in no cache
# gradients, step, elements of them that are only read, elements that are updated with theirs
Way = tuple[list[torch.Tensor], Callable[[], object], int, int]


def gradients(
    shape: tuple[int, int], listed: int, device: str | torch.device = "cpu"
) -> dict[str, list[torch.Tensor]]:
    """Some of each form, those in one place of the same rows: "listed" is coalesced."""
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(shape[0], generator=generator)
    found: dict[str, list[torch.Tensor]] = {"listed": [], "in no order": [], "twice": []}
    for rows in order.split(listed)[:LISTS]:
        rows_values = torch.randn((len(rows), shape[1]), generator=generator)
        for form, times in (("in no order", 1), ("twice", 2)):
            entries = rows.repeat(times)[None], rows_values.repeat(times, 1)
            found[form].append(torch.sparse_coo_tensor(*entries, shape, check_invariants=True).to(device))
        found["listed"].append(found["in no order"][-1].coalesce())
    first = found["listed"][0]
    dense = torch.zeros(shape, device=device).index_copy_(0, first._indices()[0], first._values())
    return {**found, "dense": [dense]}


class Turns:
    """A parameter, its gradients in every form, and the ways to step it; all share one state."""

    def __init__(self, optimizer: type[danlu.FusedOptimizer], shape: tuple[int, int], listed: int) -> None:
        generator = torch.Generator().manual_seed(0)
        size, updated = shape[0] * shape[1], listed * shape[1]
        self.p = torch.nn.Parameter(torch.randn(shape, generator=generator))
        given = gradients(shape, listed)

        inner = optimizer([self.p])
        lazy, moments = danlu.Lazy(inner), danlu.Lazy(inner, "params")
        self._written = 1 + len(inner.state_names)
        self._ceiling, self._read = BandwidthCeiling(size // 4), given["dense"][0]
        # of an element's update what is neither parameter nor gradient
        moving = 2 * len(inner.state_names) / (2 * self._written + 1)
        rest = int((size - updated) * moving)
        self.ways: dict[str, Way] = {
            ALL_ROWS: (given["dense"], inner.step, 0, size),
            "rows, listed": (given["listed"], lazy.step, 0, updated),
            "rows, listed in no order": (given["in no order"], lazy.step, 0, updated),
            "rows, listed twice": (given["twice"], lazy.step, updated, updated),
            "rows, dense gradient": (given["dense"], lazy.step, size - updated, updated),
            "params, listed": (given["listed"], moments.step, 0, updated + rest),
            "params, dense gradient": (given["dense"], moments.step, size - updated, updated + rest),
        }

    def taking(self, gradients: Sequence[torch.Tensor]) -> Callable[[], None]:
        """Gives the parameter one of them after the other."""
        others = itertools.cycle(gradients)

        def take() -> None:
            self.p.grad = next(others)

        return take

    def ceiling(self, read: int, updated: int) -> float:
        """Seconds to read as many elements and to update as many."""
        seconds = self._ceiling.seconds(4 * (2 * self._written + 1) * updated, self._written)
        if read:
            address, threads = self._read.data_ptr(), torch.get_num_threads()
            seconds += time_steps(
                lambda: _cpu.read_through(address, read, threads), lambda: None, STEPS_PER_TURN
            )
        return seconds


if __name__ == "__main__":
    main()
