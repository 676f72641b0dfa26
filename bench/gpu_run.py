"""The stages of `bench/gpu.sh` and what became of them, in a file that is whole at any time."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import commands
import results_file
from out_option import add_out_option

LIMIT = 560.0  # seconds for everything, unless DANLU_SECONDS says otherwise
FINISH = 15.0  # of them for the table and the plot

Results = dict[str, Any]  # of the stages so far, by their names
Stage = Callable[[Results], Any]


def parsed(description: str | None, arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options of bench/gpu.sh, `started`, `resume`, `stages` and `out`."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--started", type=float, default=time.time(), help="Unix time that the limit counts from"
    )
    parser.add_argument("--resume", action="store_true", help="go on after the stages in gpu.json")
    parser.add_argument(
        "--stages", metavar="A,B", default="", help="only these after the first checks (default: all)"
    )
    add_out_option(parser)
    return parser.parse_args(arguments)


class OutOfTimeError(BaseException):
    """Not an Exception: what guards a contender or a stage must let it pass."""


class Run:
    """Performs stages, and writes gpu.json after each, and whenever one has a part of its result.

    started: Unix time that the limit counts from; resume: go on after what the file has.
    """

    def __init__(self, path: Path, started: float, resume: bool = False) -> None:
        self._path = path
        self._started = started
        self.limit = float(os.environ.get("DANLU_SECONDS", LIMIT))
        os.environ[commands.DEADLINE] = str(started + self.limit - FINISH)
        self.stages: Results = results_file.read(path)["stages"] if resume else {}

    def elapsed(self) -> float:
        return time.time() - self._started

    def left(self) -> float:
        """Seconds for stages."""
        return self.limit - FINISH - self.elapsed()

    def results(self) -> Results:
        """Of the stages that have one, if only a part."""
        return {name: entry["result"] for name, entry in self.stages.items() if "result" in entry}

    def skip(self, name: str, reason: str) -> None:
        self._note(name, {"skipped": reason})
        print(f"{name}: {outcome(self.stages[name])}")

    def perform(self, name: str, stage: Stage, most: float = LIMIT) -> None:
        """Runs a stage for at most so many seconds. One that yields has a list as its result."""
        if self.left() <= 0:
            self.skip(name, f"{self.elapsed():.0f} s of {self.limit:.0f} s had passed")
            return
        print(f"{self.elapsed():5.0f} s: {name} ...")
        at, start = self.elapsed(), time.perf_counter()
        entry: Results = {}
        try:
            with _alarm(min(most, self.left())):
                result = stage(self.results())
                if isinstance(result, Iterator):
                    entry["result"] = []
                    for part in result:
                        entry["result"].append(part)
                        self._note(name, {**entry, "unfinished": True})
                else:
                    entry["result"] = result
        except (Exception, OutOfTimeError):
            entry["error"] = traceback.format_exc()[-5000:]
        self._note(name, {**entry, "at": at, "seconds": time.perf_counter() - start})
        print(f"{name}: {outcome(self.stages[name])}")

    def mark(self, name: str, **what: Any) -> None:
        """Adds to what is known of a stage."""
        self._note(name, {**self.stages[name], **what})

    def _note(self, name: str, entry: Results) -> None:
        self.stages[name] = entry
        self._path.parent.mkdir(parents=True, exist_ok=True)
        draft = self._path.with_suffix(".draft")
        draft.write_text(json.dumps({"stages": self.stages}, indent=1, default=str) + "\n")
        draft.replace(self._path)


@contextlib.contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    """Raises OutOfTimeError inside, once so many seconds have passed."""

    def out_of_time(*_: object) -> None:
        raise OutOfTimeError(f"{seconds:.0f} s have passed")

    signal.signal(signal.SIGALRM, out_of_time)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.01))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def outcome(entry: Results) -> str:
    """A line about a stage."""
    if "skipped" in entry:
        return f"skipped: {entry['skipped']}"
    failed = f", FAILED: {entry['error'].strip().splitlines()[-1][:200]}" if "error" in entry else ""
    return f"{entry['seconds']:.1f} s{failed}"
