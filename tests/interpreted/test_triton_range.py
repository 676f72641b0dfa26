"""How large gradients may be, by Triton's kernels."""

from __future__ import annotations

import pytest

from cases import Case
from gradient_range import CASES, assert_documented


# one for each function that weights a square; the interpreter takes a second for a step of the others
@pytest.mark.parametrize("case", [c for c in CASES if c.id in ("AdamW", "LAMB", "AdaX")], ids=lambda c: c.id)
def test_the_documented_range(case: Case) -> None:
    assert_documented(case, "triton", sizes=[1e19, 1e25])
