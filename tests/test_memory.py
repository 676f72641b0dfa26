"""A step allocates nothing: no temporaries of torch's, no native memory that stays."""

from __future__ import annotations

import ctypes
import gc

import pytest
import torch

import harness
from cases import ALL, BF16, CASES, EACH_STATE, F32, Case, values
from reductions import KINDS


class MallInfo(ctypes.Structure):
    """glibc's struct mallinfo2; of its ten numbers, these count what is in use."""

    _fields_ = [(f"number{i}", ctypes.c_size_t) for i in range(10)]
    from_the_system = property(lambda self: self.number4)
    from_the_heap = property(lambda self: self.number7)


def in_use() -> int:
    """Bytes that the C library has handed out."""
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = MallInfo
    info = mallinfo2()
    return int(info.from_the_heap + info.from_the_system)


def after_two_steps(
    case: Case, dtype: torch.dtype, count: int = 20, max_grad_norm: float | None = None
) -> torch.optim.Optimizer:
    params = [torch.nn.Parameter(values((5000 + i,), i, wild=False).to(dtype)) for i in range(count)]
    opt = case.make(params, state_dtype=dtype, backend="cpu", max_grad_norm=max_grad_norm)
    for p in params:
        p.grad = torch.ones_like(p)
    for _ in range(2):
        opt.step()
    return opt


@pytest.mark.parametrize("case", EACH_STATE)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_torch_allocates_nothing_in_a_step(case: Case, dtype: torch.dtype) -> None:
    opt = after_two_steps(case, dtype)
    assert harness.peak_allocated(opt.step) == 0
    clipping = after_two_steps(case, dtype, max_grad_norm=1.0)
    assert harness.peak_allocated(clipping.step) == 0
    with_temporaries = case.make(opt.param_groups, backend="reference")
    assert harness.peak_allocated(with_temporaries.step) > 0


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="mallinfo2 is glibc's")
@pytest.mark.parametrize(
    "case",
    [c if c.id in KINDS or c in CASES[:5] else pytest.param(c, marks=pytest.mark.full) for c in ALL],
    ids=lambda c: c.id,
)
def test_no_native_memory_is_kept(case: Case) -> None:
    opt = after_two_steps(case, F32)
    for _ in range(20):
        opt.step()
    gc.collect()
    before = in_use()
    for _ in range(200):
        opt.step()
    gc.collect()
    assert in_use() - before < 2000
