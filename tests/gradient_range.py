"""The table of docs/arithmetic.md that says how large a gradient may be, and steps that walk over it."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from pathlib import Path

import torch

import danlu
from cases import Case
from danlu.testing import same_bits

LARGEST = torch.finfo(torch.float32).max
SIZES = [m * 10.0**k for k in (18, 19, 20, 21) for m in (1.0, 3.0)] + [1e23, 1e28, 1e33, 1e37, 1e38, 3e38]
LATE = 3  # the step that has the large gradient
# what the table's rows are measured with: the defaults of each class
CASES = [
    Case("Lion", danlu.Lion),
    Case("Tiger", danlu.Tiger),
    Case("Adam", danlu.Adam),
    Case("AdamW", danlu.AdamW),
    Case("LAMB", danlu.LAMB),
    Case("LayerAdaptation(AdamW)", danlu.AdamW, adapted=True),
    Case("AdaX", danlu.AdaX),
    Case("AdaXW", danlu.AdaXW),
    Case("Adafactor", danlu.Adafactor),
    Case("Amos", danlu.Amos, dict(lr=1e-2, eta=0.5)),
    Case("Amos(reduce_dims=())", danlu.Amos, dict(lr=1e-2, eta=0.5, reduce_dims=())),
]
# sums of a few squares are fp32, so that these means reach fp32's largest number a little earlier in kernels
SUMS_IN_FP32 = {"Adafactor": 6.5e18, "Amos": 6.5e18}
PAGE = Path(__file__).resolve().parent.parent / "docs/arithmetic.md"


@functools.cache
def documented() -> dict[str, float]:
    """The largest gradient that each class takes in the third step, as the page says."""
    rows = re.findall(r"^\| (`.*?) \| ([0-9.e]+) \|", PAGE.read_text(), re.MULTILINE)
    return {name: float(limit) for names, limit in rows for name in re.findall("`(.*?)`", names)}


def assert_documented(case: Case, backend: str, sizes: Sequence[float] = SIZES) -> None:
    """Gradients up to the page's number leave everything finite and moving, larger ones do not; and every
    backend computes the reference's numbers, beyond it too.
    """
    limit = documented()[case.id]
    reduces = case.adapted or case.optimizer.reduces
    sizes = sorted([*sizes, 0.98 * limit, min(1.02 * limit, LARGEST)])
    found, want = walk(case, backend, sizes), walk(case, "reference", sizes)
    assert [is_trained(x) for x in found] == [size <= limit or limit >= 3e38 for size in sizes]
    for size, a, b in zip(sizes, found, want, strict=True):
        if size > SUMS_IN_FP32.get(case.id, LARGEST):
            break
        for key in b:
            assert _agrees(a[key], b[key], bits=not reduces), (size, key, a[key], b[key])


def walk(case: Case, backend: str, sizes: Sequence[float]) -> list[dict[str, torch.Tensor]]:
    """Ordinary steps, one with a gradient of each size, and smaller ones; a parameter for each size."""
    params = [torch.nn.Parameter(torch.linspace(0.5, 1.5, 6).view(2, 3)) for _ in sizes]
    opt = case.make(params, backend=backend)
    moved = [torch.zeros(())] * len(params)
    for step in range(1, LATE + 3):
        for p, size in zip(params, sizes, strict=True):
            p.grad = torch.full_like(p, 1.0 if step < LATE else size if step == LATE else size / 1e3)
        before = [p.detach().clone() for p in params]
        opt.step()
        if step > LATE:
            moved = [(p.detach() != old).all() for p, old in zip(params, before, strict=True)]
    return [{"p": p.detach(), "moved": m, **opt.state[p]} for p, m in zip(params, moved, strict=True)]


def is_trained(result: dict[str, torch.Tensor]) -> bool:
    """Whether nothing has overflowed and the parameter still moves."""
    return bool(result["moved"]) and all(bool(x.isfinite().all()) for x in result.values())


def _agrees(a: torch.Tensor, b: torch.Tensor, *, bits: bool) -> bool:
    return same_bits(a, b) if bits else torch.allclose(a, b, rtol=3e-6, atol=0.0, equal_nan=True)
