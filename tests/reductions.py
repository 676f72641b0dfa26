"""How close the results of rules that reduce must be, and matrices of every kind of tile."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from cases import EVERY_REDUCING, F32, F64, OTHER_LAYERED, Case, Storage
from danlu.testing import same_bits
from layouts import Layout, offset
from runs import Result

CASE: dict[str, Case] = {case.id: case for case in EVERY_REDUCING + OTHER_LAYERED}
# of each kind of statistic one rule, with a momentum or without: for what holds of passes, not of formulas
KINDS = ("adafactor", "adafactor-root-momentum", "lamb", "tiger-rows", "amos-rows", "amos-columns-momentum")
every_kind = pytest.mark.parametrize(
    "case",
    [c if c.id in KINDS else pytest.param(c, marks=pytest.mark.full) for c in EVERY_REDUCING],
    ids=lambda c: c.id,
)
DOUBLE = Storage(F64, F64, F32)
TOLERANCE = 1e-6  # of a tensor's norm after some steps
LAST_BIT = 3e-3  # of a tensor's norm, where some of its 16-bit numbers are the next one
# for each number of lanes tiles of one warp and of several; rows and columns end within packs, tiles, parts
MATRICES = [
    *(Layout(f"lanes-{lanes}", (2 * 256 // lanes + 3, 8 * lanes - 1)) for lanes in (1, 2, 4, 8, 16, 32)),
    *(Layout(f"few-rows-{lanes}", (max(256 // lanes - 1, 2), 8 * lanes)) for lanes in (1, 4, 32)),
    Layout("tiles", (300, 1032)),
    Layout("parts", (1030, 48)),
    Layout("tall", (34_000, 9)),
    Layout("long-row", (1, 70_001)),
    Layout("long-rows", (3, 20_000)),
    Layout("long-odd-rows", (3, 20_001)),
    Layout("many-small", (41, 5, 3, 3)),
    Layout("batch", (3, 150, 260), offset(1), offset(3)),
    Layout("batch-of-narrow", (4, 300, 12)),
]


def far(got: Result, want: Result, layouts: Sequence[Layout], tolerance: float = TOLERANCE) -> list[str]:
    """What is not equal up to rounding."""
    return [
        f"{layout.id}: {key}"
        for layout, a, b in zip(layouts, got, want, strict=True)
        for key in b
        if not difference(a[key], b[key]) < tolerance
    ]


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Of two tensors on any devices."""
    a, b = a.cpu().double(), b.cpu().double()
    return ((a - b).norm() / b.norm().clamp(min=1e-30)).item()


def assert_bits(a: Result, b: Result, layouts: Sequence[Layout]) -> None:
    for layout, x, y in zip(layouts, a, b, strict=True):
        assert all(same_bits(x[key], y[key]) for key in y), layout.id


def singles(result: Result) -> Result:
    """The fp32 states alone, which 16-bit numbers beside them do not make less exact."""
    return [{"rest": _rest(state)} for state in result]


def _rest(state: dict[str, torch.Tensor]) -> torch.Tensor:
    found = [x.flatten().cpu() for key, x in state.items() if key != "param" and x.dtype == F32]
    return torch.cat(found) if found else torch.zeros(1)
