"""Step time and memory of every optimizer against torch's, on the CPU.

    python bench/step_time.py                       both workloads, about 2 minutes on 2 cores
    python bench/step_time.py --rounds 20 --workloads many-small --contenders lion,torch-adamw

In each round every contender takes its turn: a new optimizer, one step that makes its state, then timed
steps, each with fresh gradients from autograd. Ratios compare turns of one round. What the memory can
give is measured right after each turn, by a loop that makes the same reads and writes and little else.
The first round warms up and does not count. Writes step_time.json and step_time.png, and prints a table
for each workload.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import danlu
from baselines import PlainLion
from harness import (
    KernelClock,
    Model,
    Spread,
    Stream,
    Workload,
    add_out_option,
    environment,
    gpt2_small,
    many_small,
    peak_allocated,
    positive,
    state_bytes,
    time_steps,
)

matplotlib.use("Agg")
from matplotlib import pyplot

F32, BF16 = torch.float32, torch.bfloat16
BASELINE = "torch-adamw"
STEPS_PER_TURN = 2


@dataclasses.dataclass(frozen=True)
class Contender:
    """An optimizer, and what its step has to read and write of every element."""

    id: str
    make: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]
    written: int  # arrays read and written: the parameter and states of its shape
    bytes: int  # read and written for an element, were each touched once
    dtype: torch.dtype = F32


CONTENDERS = [
    Contender("torch-adamw", lambda p: torch.optim.AdamW(p, fused=True), 3, 28),
    Contender("torch-adamw-foreach", lambda p: torch.optim.AdamW(p, foreach=True), 3, 28),
    Contender("torch-adamw-bf16", lambda p: torch.optim.AdamW(p, fused=True), 3, 14, BF16),
    Contender("torch-sgd", lambda p: torch.optim.SGD(p, momentum=0.9, fused=True), 2, 20),
    Contender("torch-adafactor", lambda p: torch.optim.Adafactor(p), 1, 12),
    Contender("plain-lion", lambda p: PlainLion(p), 2, 20),
    Contender("plain-lion-foreach", lambda p: PlainLion(p, foreach=True), 2, 20),
    Contender("lion", lambda p: danlu.Lion(p), 2, 20),
    Contender("lion-bf16", lambda p: danlu.Lion(p, state_dtype=BF16), 2, 10, BF16),
    Contender("tiger", lambda p: danlu.Tiger(p), 2, 20),
    Contender("adamw", lambda p: danlu.AdamW(p), 3, 28),
    Contender("adam", lambda p: danlu.Adam(p), 3, 28),
    Contender("adax", lambda p: danlu.AdaX(p), 3, 28),
    Contender("adaxw", lambda p: danlu.AdaXW(p), 3, 28),
]

WORKLOADS = {workload.id: workload for workload in (gpt2_small(), many_small())}


@dataclasses.dataclass(frozen=True)
class Turn:
    """Seconds for a step."""

    step: float
    kernel: float | None  # the part of it without Python, for danlu's
    stream: float  # of the same bytes
    host: float  # with tensors of one element


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    console = Console(width=None if sys.stdout.isatty() else 140)
    workloads = []
    with Ticker(console, len(options.workloads) * (options.rounds + 1) * len(options.contenders)) as ticker:
        for workload in options.workloads:
            workloads.append(measure(workload, options.contenders, options.rounds, ticker))
    results = {"environment": environment(), "rounds": options.rounds, "workloads": workloads}

    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "step_time.json").write_text(json.dumps(results, indent=2) + "\n")
    plot(results, options.out / "step_time.png")
    for measured in workloads:
        console.print(table(measured))
    console.print(LEGEND, highlight=False)
    console.print(f"wrote step_time.json and step_time.png to {options.out}")


LEGEND = f"""\
ms        median over the rounds, with quartiles
ratio     how many times faster than {BASELINE} in the same round
GB/s      the bytes that a step has to touch, by its time
stream    an in-place loop over as many bytes, right after the step: what the memory gives; the whole
          step's speed by its speed, and that of danlu's kernels alone
host      microseconds per tensor, measured with as many tensors of one element
state     bytes kept per parameter
extra     the most memory that torch's allocators held during a step, beyond what they held before it
"""


def measure(
    workload: Workload, contenders: Sequence[Contender], rounds: int, ticker: Ticker
) -> dict[str, Any]:
    """All contenders on one workload."""
    dtypes = {c.dtype for c in contenders}
    models = {dtype: Model(workload, dtype) for dtype in dtypes}
    single_elements = {dtype: Model(workload.single_elements(), dtype) for dtype in dtypes}
    stream = Stream(workload.elements)
    turns: dict[str, list[Turn]] = {c.id: [] for c in contenders}
    memory: dict[str, dict[str, float]] = {}
    for round_ in range(rounds + 1):
        for c in contenders[:: 1 if round_ % 2 else -1]:
            ticker.show(f"{workload.id}, round {round_} of {rounds}", c.id)
            host, _ = timed(c, single_elements[c.dtype])
            step, kernel = timed(c, models[c.dtype])
            turn = Turn(step, kernel, stream.seconds(c.bytes * workload.elements, c.written), host)
            if round_ == 0:
                memory[c.id] = use_of_memory(c, models[c.dtype], workload.elements)
            else:
                turns[c.id].append(turn)
    return {
        "id": workload.id,
        "title": workload.title,
        "elements": workload.elements,
        "tensors": len(workload.shapes),
        "contenders": [
            {"name": c.id, **figures(c, workload, turns[c.id], turns.get(BASELINE)), **memory[c.id]}
            for c in contenders
        ],
    }


def timed(contender: Contender, model: Model) -> tuple[float, float | None]:
    """Seconds for a step, and for the part of it that runs without Python."""
    optimizer = contender.make(model.parameters)
    model.backward()
    optimizer.step()
    clock = KernelClock.attach(optimizer)
    seconds = time_steps(optimizer.step, model.backward, STEPS_PER_TURN)
    return seconds, clock.seconds / STEPS_PER_TURN if clock else None


def use_of_memory(contender: Contender, model: Model, elements: int) -> dict[str, float]:
    optimizer = contender.make(model.parameters)
    optimizer.step()
    return {
        "state_bytes_per_parameter": state_bytes(optimizer) / elements,
        "peak_extra_bytes": peak_allocated(optimizer.step),
    }


def figures(
    contender: Contender, workload: Workload, turns: list[Turn], baseline: list[Turn] | None
) -> dict[str, Any]:
    """What follows from the turns of a contender."""
    touched = contender.bytes * workload.elements
    of_danlu = [turn for turn in turns if turn.kernel is not None]
    row = {
        "ms": spread(1e3 * turn.step for turn in turns),
        "ratio": spread(b.step / t.step for b, t in zip(baseline, turns, strict=True)) if baseline else None,
        "GB_per_s": spread(touched / turn.step / 1e9 for turn in turns),
        "stream_GB_per_s": spread(touched / turn.stream / 1e9 for turn in turns),
        "share_of_stream": spread(turn.stream / turn.step for turn in turns),
        "host_us_per_tensor": spread(1e6 * turn.host / len(workload.shapes) for turn in turns),
    }
    if of_danlu:
        row["kernel_ms"] = spread(1e3 * turn.kernel for turn in of_danlu)
        row["kernel_share_of_stream"] = spread(turn.stream / turn.kernel for turn in of_danlu)
    return row


def spread(sample: Iterable[float]) -> dict[str, float]:
    return dataclasses.asdict(Spread.of(list(sample)))


class Ticker:
    """Shows how far the measurement is: a bar on a terminal, else a line for each round."""

    def __init__(self, console: Console, turns: int) -> None:
        columns = TextColumn("{task.description:58}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        self._console = console
        self._progress = Progress(*columns, console=console, disable=not console.is_terminal)
        self._task = self._progress.add_task("", total=turns)
        self._printed = ""

    def __enter__(self) -> Ticker:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def show(self, round_: str, contender: str) -> None:
        """To be called before each turn."""
        done = self._progress.tasks[self._task].description != ""
        self._progress.update(self._task, description=f"{round_}: {contender}", advance=1 if done else 0)
        if not self._console.is_terminal and round_ != self._printed:
            self._printed = round_
            self._console.print(round_)


def table(measured: dict[str, Any]) -> Table:
    shown = Table(title=measured["title"])
    shown.add_column("optimizer", no_wrap=True)
    headings = ("ms", "ratio", "GB/s", "step/\nstream", "kernels/\nstream", "host\nus/tensor")
    for heading in (*headings, "state\nB/parameter", "extra\nMB"):
        shown.add_column(heading, justify="right", no_wrap=True)
    for row in measured["contenders"]:
        shown.add_row(
            row["name"],
            text(row["ms"], ".1f"),
            text(row["ratio"], ".2f"),
            f"{row['GB_per_s']['median']:.1f}",
            f"{row['share_of_stream']['median']:.0%}",
            f"{row['kernel_share_of_stream']['median']:.0%}" if "kernel_ms" in row else "",
            f"{row['host_us_per_tensor']['median']:.2f}",
            f"{row['state_bytes_per_parameter']:.2f}",
            f"{row['peak_extra_bytes'] / 1e6:.1f}",
        )
    return shown


def text(spread: dict[str, float] | None, form: str) -> str:
    """Median and quartiles."""
    if spread is None:
        return ""
    return f"{spread['median']:{form}} ({spread['low']:{form}}-{spread['high']:{form}})"


def plot(results: dict[str, Any], path: Path) -> None:
    """A panel for each workload: the step's time, kernels darker, and where the ceiling is."""
    workloads = results["workloads"]
    figure, panels = pyplot.subplots(
        1, len(workloads), squeeze=False, figsize=(7 * len(workloads), 5.5), layout="constrained"
    )
    for panel, measured in zip(panels[0], workloads, strict=True):
        rows = measured["contenders"][::-1]
        names, steps = [row["name"] for row in rows], [row["ms"] for row in rows]
        medians = [s["median"] for s in steps]
        errors = [[s["median"] - s["low"] for s in steps], [s["high"] - s["median"] for s in steps]]
        panel.barh(names, medians, xerr=errors, color="tab:orange", label="step, beside the kernels")
        kernels = [row["kernel_ms"]["median"] if "kernel_ms" in row else 0 for row in rows]
        panel.barh(names, kernels, color="tab:red", label="kernels (danlu)")
        streams = [row["share_of_stream"]["median"] * m for row, m in zip(rows, medians, strict=True)]
        panel.plot(streams, names, "k|", markersize=14, label="in-place stream of the same bytes")
        panel.set(title=measured["title"], xlabel="ms per step", xscale="log")
        panel.grid(axis="x", alpha=0.3)
    panels[0][0].legend()
    environment = results["environment"]
    figure.suptitle(
        f"{environment['device']}, {environment['threads']} threads, torch {environment['torch']}"
    )
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    contenders = {c.id: c for c in CONTENDERS}

    def some_of(table: dict[str, Any]) -> Callable[[str], list[Any]]:
        def chosen(names: str) -> list[Any]:
            for name in names.split(","):
                if name not in table:
                    raise argparse.ArgumentTypeError(f"must name some of {', '.join(table)}, got {name!r}")
            return [table[name] for name in names.split(",")]

        return chosen

    parser.add_argument("--rounds", metavar="N", type=positive, default=5, help="default: %(default)s")
    parser.add_argument(
        "--workloads",
        metavar="NAME,...",
        type=some_of(WORKLOADS),
        default=list(WORKLOADS.values()),
        help=f"default: {','.join(WORKLOADS)}",
    )
    parser.add_argument(
        "--contenders",
        metavar="NAME,...",
        type=some_of(contenders),
        default=CONTENDERS,
        help=f"default: {','.join(contenders)}",
    )
    add_out_option(parser)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
