"""Tests and measurements on a GPU, stage after stage; `bash bench/gpu.sh` builds what it needs and runs it.

    python bench/gpu.py --out DIR

A stage that fails is written down with its traceback, and the next one runs; where the failure has made
CUDA unusable in this process, the process is replaced first. Once the time is up, a stage is interrupted and
the others are skipped. gpu.json is written anew after each stage. At the end there are a table and gpu.png.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import cuda_harness
from gpu_report import lines, plot
from gpu_stages import STAGES
from harness import add_out_option

BUDGET = 450.0  # seconds; no stage starts later
GRACE = 45.0  # beyond them, for the stage that runs then


class OutOfTimeError(BaseException):
    """Not an Exception: what guards a contender or a stage must let it pass."""


class Run:
    """The stages and what became of them, in a file that is whole at any time."""

    def __init__(self, path: Path, started: float, resume: bool) -> None:
        self._path = path
        self._started = started
        self.stages: dict[str, Any] = json.loads(path.read_text())["stages"] if resume else {}

    def elapsed(self) -> float:
        return time.time() - self._started

    def results(self) -> dict[str, Any]:
        """Of the stages that have one."""
        return {name: entry["result"] for name, entry in self.stages.items() if "result" in entry}

    def perform(self, name: str, stage: Callable[[dict[str, Any]], Any]) -> None:
        if self.elapsed() > BUDGET:
            self.stages[name] = {
                "skipped": f"{self.elapsed():.0f} s had passed, the budget is {BUDGET:.0f} s"
            }
        else:
            print(f"{name} ...")
            self.stages[name] = self._guarded(stage)
        self._save()
        print(f"{name}: {outcome(self.stages[name])}")

    def _guarded(self, stage: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
        start = time.perf_counter()
        signal.signal(signal.SIGALRM, _out_of_time)
        signal.setitimer(signal.ITIMER_REAL, BUDGET + GRACE - self.elapsed())
        try:
            entry = {"result": stage(self.results())}
        except (Exception, OutOfTimeError):
            entry = {"error": traceback.format_exc()}
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        return {**entry, "seconds": time.perf_counter() - start}

    def _save(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        draft = self._path.with_suffix(".draft")
        draft.write_text(json.dumps({"stages": self.stages}, indent=1, default=str) + "\n")
        draft.replace(self._path)


def _out_of_time(*_: object) -> None:
    raise OutOfTimeError(f"{BUDGET + GRACE:.0f} s have passed")


def outcome(entry: dict[str, Any]) -> str:
    """A line about a stage."""
    if "skipped" in entry:
        return f"skipped: {entry['skipped']}"
    ending = "" if "result" in entry else f", FAILED: {entry['error'].strip().splitlines()[-1][:200]}"
    return f"{entry['seconds']:.1f} s{ending}"


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 0 if all stages came to their end and no test failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--started", type=float, default=time.time(), help="Unix time that the budget counts from"
    )
    parser.add_argument("--resume", action="store_true", help="go on after the stages in gpu.json")
    add_out_option(parser)
    options = parser.parse_args(arguments)
    missing = cuda_harness.unavailable()
    if missing:
        print(f"bench/gpu.py: {missing}", file=sys.stderr)
        return 1
    run = Run(options.out / "gpu.json", options.started, options.resume)
    for name, stage in STAGES.items():
        if name in run.stages:
            continue
        run.perform(name, stage)
        if unusable():
            start_anew(options)
    results = run.results()
    try:
        plot(results, options.out / "gpu.png")
    except Exception:
        traceback.print_exc()
    print("\n".join(lines(run.stages)))
    done = all("result" in entry for entry in run.stages.values())
    return 0 if done and results["tests"]["exit_status"] == 0 else 1


def unusable() -> bool:
    """Whether an error has made CUDA unusable in this process."""
    try:
        torch.cuda.synchronize()
        cuda_harness.free()
    except Exception:
        return True
    return False


def start_anew(options: argparse.Namespace) -> None:
    """Replaces this process by one that goes on with the next stage."""
    print("CUDA is unusable in this process, going on in a new one", flush=True)
    arguments = ["--resume", "--started", str(options.started), "--out", str(options.out)]
    os.execv(sys.executable, [sys.executable, str(Path(__file__).resolve()), *arguments])


if __name__ == "__main__":
    sys.exit(main())
