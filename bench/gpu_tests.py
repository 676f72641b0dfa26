"""The tests that need a GPU, in processes of their own: `python bench/gpu_tests.py FILE [pytest arguments]`.

The longest come first, on several workers where pytest-xdist is installed. Each outcome goes into FILE at
once, a line of JSON for each, so that those before a crash, or before the time was up, are known.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

import pytest

WORKERS = 8
# the longest first: gigabytes of memory, millions of numbers on the CPU, ten runs
LONGEST = (
    "test_a_tensor_of_more_than_2_to_the_31_elements",
    "test_a_matrix_of_more_than_2_to_the_31_elements",
    "test_rounding_to_bf16",
    "test_any_bit_patterns",
    "test_coefficients_of_two_million_steps",
    "test_thousands_of_tensors_of_odd_sizes",
    "test_the_same_bits_from_run_to_run",
    "test_close_to_float64_and_to_the_cpu",
    "test_16_bits",
)


class Recorder:
    """Writes down what becomes of each test."""

    def __init__(self, lines: TextIO) -> None:
        self._lines = lines

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self._write(report, report.duration)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._write(report, 0.0)

    def _write(self, report: pytest.TestReport | pytest.CollectReport, seconds: float) -> None:
        line = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(seconds, 3)}
        self._lines.write(json.dumps({**line, "message": message(report)}) + "\n")


def message(report: pytest.TestReport | pytest.CollectReport) -> str:
    """Why it failed or was skipped, in short."""
    if report.outcome == "passed":
        return ""
    if isinstance(report.longrepr, tuple):
        return str(report.longrepr[2])
    crash = getattr(report.longrepr, "reprcrash", None)
    return (crash.message if crash else report.longreprtext)[:600]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first; xdist's workers load this file as a plugin and must all have one order."""
    rank = {name: at for at, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(getattr(item, "originalname", item.name), len(rank)))


def workers() -> list[str]:
    """Options that spread tests over processes, one at a time; none without xdist or with one core."""
    count = min(WORKERS, len(os.sched_getaffinity(0)))
    if importlib.util.find_spec("xdist") is None or count == 1:
        return []
    return ["-n", str(count), "--dist", "load", "--maxschedchunk", "1"]


def main(arguments: Sequence[str]) -> int:
    path, *rest = arguments
    here = str(Path(__file__).resolve().parent)  # where xdist's workers find this file
    os.environ["PYTHONPATH"] = os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])
    # a warning of another version of torch is no failure here
    options = ["-p", "no:cacheprovider", "-p", "gpu_tests", "-q", "--tb=short", "-W", "default", *workers()]
    with Path(path).open("w", buffering=1) as lines:
        return pytest.main([*options, *rest], plugins=[Recorder(lines)])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
