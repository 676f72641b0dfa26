"""What `make test` runs: pairs of values instead of products, and a number for what it leaves out."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from selection import covering

SOME_TESTS = """
import pytest

@pytest.fixture(params="xyz")
def letter(request):
    return request.param

@pytest.mark.pairs
@pytest.mark.parametrize("a", range(4))
@pytest.mark.parametrize("b", range(3))
def test_product(a, b, letter):
    print(a, b, letter, sep="|", end="|seen")

@pytest.mark.parametrize("a", [1, pytest.param(2, marks=pytest.mark.full)])
def test_values(a):
    pass

@pytest.mark.full
def test_long():
    pass
"""


def product(*sizes: int) -> list[dict[str, int]]:
    names = "abcdef"[: len(sizes)]
    return [dict(zip(names, row, strict=True)) for row in itertools.product(*map(range, sizes))]


def pairs(rows: list[dict[str, int]]) -> set[tuple[tuple[str, int], tuple[str, int]]]:
    return {pair for row in rows for pair in itertools.combinations(sorted(row.items()), 2)}


@pytest.mark.parametrize(
    ("sizes", "most"),
    [((24, 39, 4), 1000), ((24, 5, 2, 3), 130), ((3, 3, 3, 3, 3), 20), ((7, 5), 35)],
    ids=str,
)
def test_every_two_values_meet(sizes: tuple[int, ...], most: int) -> None:
    rows = product(*sizes)
    kept = [rows[i] for i in covering(rows)]
    assert pairs(kept) == pairs(rows)
    assert len(kept) <= most


def test_only_what_there_is_can_meet() -> None:
    rows = [row for row in product(4, 4, 4) if row["a"] != row["b"]]
    assert pairs([rows[i] for i in covering(rows)]) == pairs(rows)


def test_one_factor_is_kept_whole() -> None:
    assert covering(product(5)) == [0, 1, 2, 3, 4]
    assert covering([{}]) == [0]


def test_the_same_each_time() -> None:
    assert covering(product(5, 4, 3)) == covering(product(5, 4, 3))


def run(folder: Path, *arguments: str) -> tuple[int, int, str]:
    """How many tests passed, how many are said to be left out, the output."""
    (folder / "test_some.py").write_text(SOME_TESTS)
    options = [
        "-p",
        "file_table",
        "-p",
        "selection",
        "-p",
        "no:cacheprovider",
        "-s",
        "-o",
        "markers=pairs\nfull",
        f"--rootdir={folder}",
    ]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "PYTEST_ADDOPTS": ""}
    made = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *arguments],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
    )
    assert made.returncode == 0, made.stdout + made.stderr
    passed, left = re.search(r"(\d+) passed", made.stdout), re.search(r"(\d+) tests were left", made.stdout)
    assert passed
    return int(passed[1]), int(left[1]) if left else 0, made.stdout


def test_what_is_left_out_is_a_number(tmp_path: Path) -> None:
    passed, left, output = run(tmp_path)
    seen = re.findall(r"(\d)\|(\d)\|(\w)\|seen", output)
    assert passed == len(seen) + 1
    assert passed + left == 4 * 3 * 3 + 3
    assert len({(a, b) for a, b, _ in seen}) == len({(a, c) for a, _, c in seen}) == 12
    assert len({(b, c) for _, b, c in seen}) == 9
    assert run(tmp_path, "-n", "2")[:2] == (passed, left)


def test_everything_with_all_and_what_is_named(tmp_path: Path) -> None:
    assert run(tmp_path, "--all")[:2] == (39, 0)
    assert run(tmp_path, "test_some.py::test_long")[:2] == (1, 0)
