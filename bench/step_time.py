"""Step time and memory of every optimizer against torch's, on the CPU or on a GPU.

    python bench/step_time.py                       three workloads, about 4 minutes on 2 cores
    python bench/step_time.py --rounds 20 --workloads many-small --contenders lion,torch-adamw
    python bench/step_time.py --device cuda         three workloads, some 6 minutes
    python bench/step_time.py --wrappers            what wrappers add to a step, about 3 minutes, 5 GB

In each round every contender takes its turn: a new optimizer, steps that make its state, then timed steps.
Ratios compare turns of one round. What the memory can give is measured right after each turn, by a loop
(a kernel) that makes the same reads and writes and little else. The first round warms up and does not
count. Prints a table for each workload and writes step_time.json (on a GPU step_time_cuda.json) with plots
beside it, which bench/step_plots.py draws again.

On the CPU each step has fresh gradients from autograd. On a GPU gradients stay where they are, and a step's
time is the GPU's: between events around the step, which is in the stream as a whole before the GPU comes to
it (cuda_harness.time_on_gpu). The host's share is the time until step() returns on an idle GPU. Kernels are
counted and timed by torch's profiler, in one step after all rounds.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import cuda_harness
import harness
import lazy_rows
import wrappers
from contenders import ON_CPU, ON_CUDA
from cuda_harness import OnCuda
from harness import OnCpu, positive
from out_option import add_out_option
from rounds import Place, measure, profile
from step_plots import draw
from step_report import LEGENDS, table
from workloads import gpt2_small, llama_1b, many_small, matrices

WORKLOADS = {workload.id: workload for workload in (gpt2_small(), many_small(), matrices(), llama_1b())}
CONTENDERS = {"cpu": ON_CPU, "cuda": ON_CUDA}
DEFAULT_WORKLOADS = {
    "cpu": ["gpt2-small", "many-small", "matrices"],
    "cuda": ["gpt2-small", "many-small", "llama-3.2-1b"],
}
PLACES: dict[str, Place] = {"cpu": OnCpu, "cuda": OnCuda}


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    console = Console(width=None if sys.stdout.isatty() else 140)
    if options.wrappers:
        return time_wrappers(options, console)
    place, workloads = PLACES[options.device], []
    with Ticker(console, len(options.workloads) * (options.rounds + 1) * len(options.contenders)) as ticker:
        for workload in options.workloads:
            rounds = range(options.rounds + 1)
            workloads.append(measure(place, workload, options.contenders, rounds, ticker.show))
    described = cuda_harness.environment() if options.device == "cuda" else harness.environment()
    results = {"environment": described, "rounds": options.rounds, "workloads": workloads}
    if options.device == "cuda":
        # the profiler may leave its mark on the time of launches
        for workload, measured in zip(options.workloads, workloads, strict=True):
            profile(workload, options.contenders, measured)
        results["copy_GB_per_s"] = cuda_harness.copy_bandwidth() / 1e9

    name = {"cpu": "step_time", "cuda": "step_time_cuda"}[options.device]
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"{name}.json").write_text(json.dumps(results, indent=2) + "\n")
    plots = draw(results, options.out / f"{name}.png")
    for measured in workloads:
        console.print(table(measured))
    console.print(LEGENDS[options.device], highlight=False)
    console.print(f"wrote {', '.join([f'{name}.json', *plots])} to {options.out}")


def time_wrappers(options: argparse.Namespace, console: Console) -> None:
    with Ticker(console, (options.rounds + 1) * len(wrappers.PASSES)) as ticker:
        measured = wrappers.measure(gpt2_small(), options.rounds, ticker.show)
    lazy = lazy_rows.measure(lazy_rows.SHAPE, lazy_rows.LISTED, options.rounds)
    results = {"environment": harness.environment(), "rounds": options.rounds, "workloads": [measured]}
    results["lazy_rows"] = lazy
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "wrappers.json").write_text(json.dumps(results, indent=2) + "\n")
    console.print(wrappers.table(measured))
    console.print(lazy_rows.table(lazy))
    console.print(f"wrote wrappers.json to {options.out}")


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


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", metavar="N", type=positive, default=5, help="default: %(default)s")
    parser.add_argument("--device", choices=list(CONTENDERS), default="cpu", help="default: %(default)s")
    parser.add_argument("--workloads", metavar="NAME,...", help=f"of {', '.join(WORKLOADS)}")
    every = dict.fromkeys(c.id for contenders in CONTENDERS.values() for c in contenders)
    parser.add_argument("--contenders", metavar="NAME,...", help=f"of {', '.join(every)}")
    parser.add_argument("--wrappers", action="store_true", help="time the passes of wrappers instead")
    add_out_option(parser)
    options = parser.parse_args(arguments)
    if options.wrappers and (options.device != "cpu" or options.workloads or options.contenders):
        parser.error(
            "--wrappers: has workloads of its own on the CPU, takes no --device, --workloads, --contenders"
        )
    if options.device == "cuda" and (missing := cuda_harness.unavailable()):
        parser.error(f"--device cuda: {missing}")

    def chosen(option: str, names: str | None, table: dict[str, Any], default: Sequence[str]) -> list[Any]:
        wanted = list(default) if names is None else names.split(",")
        for name in wanted:
            if name not in table:
                parser.error(f"{option}: must name some of {', '.join(table)}, got {name!r}")
        return [table[name] for name in wanted]

    contenders = {c.id: c for c in CONTENDERS[options.device]}
    options.workloads = chosen("--workloads", options.workloads, WORKLOADS, DEFAULT_WORKLOADS[options.device])
    options.contenders = chosen("--contenders", options.contenders, contenders, list(contenders))
    return options


if __name__ == "__main__":
    main()
