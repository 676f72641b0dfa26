"""Steps of Triton's kernels that stop where their sums are complete, for each kind of statistic."""

from __future__ import annotations

import pytest

from cases import Case
from reductions import CASE, every_kind
from test_rounds import SMALLER_SUMS, check_same_bits, check_stops, check_summations, check_two_halves

# a cut along each dimension, a part without elements; the interpreter takes one tile after the other, and
# one row where a rule takes each by itself
SMALLER = {
    ("tiger-rows", (262, 264), 0): ((13, 264), 6),
    ("tiger-rows", (262, 264), 1): ((13, 264), 130),
    ("tiger-rows", (33, 40), 1): ((9, 40), 40),
}
SMALLER |= {(name, (262, 264), 0): ((70, 264), 35) for name in ("lamb", "amos-rows", "amos-columns-momentum")}
CUTS = [
    ((262, 264), 0, 131),
    ((33, 40), 1, 40),
    pytest.param((262, 264), 1, 130, marks=pytest.mark.full),
    pytest.param((3, 20, 31), 0, 1, marks=pytest.mark.full),
]


@pytest.mark.parametrize(("shape", "dim", "at"), CUTS, ids=lambda x: str(x).replace(" ", ""))
@every_kind
def test_two_halves_step_as_the_whole(case: Case, shape: tuple[int, ...], dim: int, at: int) -> None:
    shape, at = SMALLER.get((case.id, shape, dim), (shape, at))
    check_two_halves(case, "triton", shape, dim, at)


@every_kind
def test_a_step_that_stops_has_the_bits_of_one_that_does_not(case: Case) -> None:
    check_same_bits(case, "triton")


def test_sums_of_parts() -> None:
    check_summations("triton", SMALLER_SUMS)


@pytest.mark.parametrize(
    ("name", "shapes"), [("adafactor", [(3, 300, 70), (0, 5), (5, 0)]), ("lamb", [(600_001,), (5,)])]
)
def test_what_stands_at_a_stop(name: str, shapes: list[tuple[int, ...]]) -> None:
    check_stops(CASE[name], "triton", shapes)
