"""Which tests are run, and in what order: `make test` runs a part, `--all` (`make test-all`) everything.

    @pytest.mark.full    runs with --all alone; also as the mark of a parameter
    @pytest.mark.pairs   of all combinations of its parameters as many as it takes that every two values meet

What is left out is deselected, never skipped, and its number is printed. Tests that are named, as in
`pytest tests/test_x.py::test_y[z]`, are run in any case.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from file_table import known_seconds


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="run everything, as `make test-all` does")


@pytest.hookimpl(trylast=True)  # after -k and -m
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--all") and not any("::" in name for name in config.args):
        left = left_out(items)
        if left:
            config.hook.pytest_deselected(items=[item for item in items if item in left])
            items[:] = [item for item in items if item not in left]
        getattr(config, "workeroutput", {})["left_out"] = len(left)
        config.stash[LEFT_OUT] = len(left)
    seconds = known_seconds()
    items.sort(key=lambda item: -seconds.get(item.path.name, float("inf")))  # what is new comes first


LEFT_OUT, ELSEWHERE = pytest.StashKey[int](), pytest.StashKey[int]()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """All of xdist's processes leave out the same, and each runs other tests."""
    found, stash = getattr(node, "workeroutput", {}), node.config.stash
    stash[ELSEWHERE] = stash.get(ELSEWHERE, 0) + found.get("left_out_elsewhere", 0)
    stash[LEFT_OUT] = found.get("left_out", 0) + stash[ELSEWHERE]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if number := config.stash.get(LEFT_OUT, 0):
        terminalreporter.write_line(f"{number} tests were left to `make test-all`")


def left_elsewhere(config: pytest.Config, output: str) -> None:
    """Adds what pytest left out in a process that a test has run, by its output."""
    found = re.search(r"(\d+) tests were left to", output)
    number = int(found[1]) if found else 0
    config.stash[LEFT_OUT] = config.stash.get(LEFT_OUT, 0) + number
    if hasattr(config, "workeroutput"):
        config.workeroutput["left_out_elsewhere"] = config.workeroutput.get("left_out_elsewhere", 0) + number


def left_out(items: Sequence[pytest.Item]) -> set[pytest.Item]:
    left = {item for item in items if item.get_closest_marker("full")}
    products: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("pairs") and item not in left:
            products.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for product in products.values():
        kept = set(covering([_values(item) for item in product]))
        left.update(item for i, item in enumerate(product) if i not in kept)
    return left


def _values(item: pytest.Item) -> Mapping[str, int]:
    """Of its parameters: items of one test have the same objects, and pytest's own indices count items."""
    return (
        {name: id(value) for name, value in item.callspec.params.items()} if hasattr(item, "callspec") else {}
    )


def covering(rows: Sequence[Mapping[str, int]]) -> list[int]:
    """Indices of rows in which each two values meet that meet in any; each single value is in one, too.

    Greedy, and always the same: the next row is the first with the most pairs that are still missing.
    """
    pairs = [frozenset(itertools.combinations_with_replacement(sorted(row.items()), 2)) for row in rows]
    missing = frozenset().union(*pairs)
    most = [len(found) for found in pairs]  # it cannot have more new ones than it had before
    kept = [] if missing or not rows else [0]
    while missing:
        best, gain = -1, 0
        for i, bound in enumerate(most):
            if bound > gain:
                most[i] = len(pairs[i] & missing)
                if most[i] > gain:
                    best, gain = i, most[i]
        kept.append(best)
        missing -= pairs[best]
    return sorted(kept)
