"""A table of test files: tests, what became of them, and the seconds by which files are put in order."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import rich.console
import rich.table

SECONDS = Path(__file__).with_name("seconds.txt")
LAST = pytest.StashKey[float]()


def known_seconds() -> dict[str, float]:
    """CPU time of each file, as it was measured last."""
    lines = map(str.split, SECONDS.read_text().splitlines())
    return {name: float(seconds) for seconds, name in lines}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-seconds", action="store_true", help=f"of the files that run, to {SECONDS.name}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Iterator[None]:
    """Notes the CPU time since the last test, of this process and those that it has waited for."""
    yield
    now = sum(os.times()[:4])
    item.user_properties.append(("cpu_seconds", now - item.config.stash.get(LAST, now)))
    item.config.stash[LAST] = now


def pytest_collection_finish(session: pytest.Session) -> None:
    session.config.stash[LAST] = sum(os.times()[:4])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    counts: dict[str, Counter[str]] = {}
    for outcome in ("passed", "failed", "error", "skipped"):
        for report in terminalreporter.getreports(outcome):
            counts.setdefault(report.nodeid.split("::")[0], Counter())[outcome] += 1
    seconds: Counter[str] = Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport) and report.when == "teardown":
                found = dict(report.user_properties).get("cpu_seconds", 0.0)
                seconds[report.nodeid.split("::")[0]] += found  # type: ignore[assignment, operator]
    table = rich.table.Table("file", "passed", "failed", "skipped", "CPU seconds")
    for file, outcomes in sorted(counts.items()):
        failed = outcomes["failed"] + outcomes["error"]
        numbers = (outcomes["passed"], failed, outcomes["skipped"], f"{seconds[file]:.1f}")
        table.add_row(file, *map(str, numbers))
    rich.console.Console(file=terminalreporter._tw._file, width=80).print(table)
    if config.getoption("--write-seconds"):
        measured = {file.rpartition("/")[2]: taken for file, taken in seconds.items()}
        write_seconds({**known_seconds(), **measured})


def write_seconds(seconds: dict[str, float]) -> None:
    lines = [f"{taken:6.1f} {name}\n" for name, taken in sorted(seconds.items(), key=lambda x: (-x[1], x[0]))]
    SECONDS.write_text("".join(lines))
