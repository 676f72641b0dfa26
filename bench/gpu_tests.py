"""The tests that need a GPU, in a process of their own: `python bench/gpu_tests.py FILE [pytest arguments]`.

Each outcome goes into FILE at once, a line of JSON for each, so that those before a crash are known.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

import pytest


class Recorder:
    """Writes down what becomes of each test."""

    def __init__(self, lines: TextIO) -> None:
        self._lines = lines

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self._write(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._write(report)

    def _write(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        line = {"test": report.nodeid, "outcome": report.outcome, "message": message(report)}
        self._lines.write(json.dumps(line) + "\n")


def message(report: pytest.TestReport | pytest.CollectReport) -> str:
    """Why it failed or was skipped, in short."""
    if isinstance(report.longrepr, tuple):
        return str(report.longrepr[2])
    crash = getattr(report.longrepr, "reprcrash", None)
    return (crash.message if crash else report.longreprtext)[:600]


def main(arguments: Sequence[str]) -> int:
    path, *rest = arguments
    # a warning of another version of torch is no failure here
    options = ["-p", "no:cacheprovider", "-q", "-W", "default"]
    with Path(path).open("w", buffering=1) as lines:
        return pytest.main([*options, *rest], plugins=[Recorder(lines)])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
