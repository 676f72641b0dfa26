"""How large gradients may be, on every backend that runs in this process."""

from __future__ import annotations

import pytest
import torch

import danlu
from cases import Case
from gradient_range import CASES, assert_documented, documented


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_the_documented_range(case: Case, backend: str) -> None:
    assert_documented(case, backend)


def test_the_page_has_every_class() -> None:
    assert documented().keys() == {case.id for case in CASES}


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_the_range_is_torchs(name: str, backend: str) -> None:
    """A gradient whose square fp32 cannot hold, and torch's parameters, up to rounding, 200 steps later."""
    ours, theirs = (torch.nn.Parameter(torch.ones(5)) for _ in range(2))
    optimizers = [
        getattr(danlu, name)([ours], lr=0.1, backend=backend),
        getattr(torch.optim, name)([theirs], lr=0.1),
    ]
    for step in range(200):
        for p, opt in zip((ours, theirs), optimizers, strict=True):
            p.grad = torch.full_like(p, 1e20 if step == 2 else 1.0)
            opt.step()
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5)
