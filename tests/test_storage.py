"""Every 16-bit value, and every place where rounding to 16 bits turns, through the native kernels."""

from __future__ import annotations

import pytest
import torch

import danlu
from cases import STORAGES, Storage, set_gradient
from danlu import _cpu
from danlu.testing import same_bits

HALVES = [torch.bfloat16, torch.float16]


@pytest.fixture(params=_cpu.instruction_sets(), autouse=True)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("DANLU_CPU_ISA", request.param)
    return str(request.param)


def all_patterns(dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


@pytest.mark.parametrize("dtype", HALVES)
def test_all_values_survive_a_load_and_a_store(dtype: torch.dtype) -> None:
    start = all_patterns(dtype)
    for size in (len(start), len(start) - 3):  # with and without a tail
        p = torch.nn.Parameter(start[:size].clone())
        opt = danlu.Lion([p], lr=1.0, weight_decay=0.0, backend="cpu")
        p.grad = torch.zeros_like(p)
        opt.step()
        # weight_decay is 0, and 0 * inf is NaN
        assert same_bits(p, start[:size].masked_fill(start[:size].isinf(), float("nan")))


@pytest.mark.parametrize("dtype", HALVES)
def test_a_load_is_exact(dtype: torch.dtype) -> None:
    g = all_patterns(dtype)
    p = torch.nn.Parameter(torch.zeros_like(g))
    opt = danlu.Lion([p], betas=(0.0, 0.0), backend="cpu")  # m = 0 * m + 1 * g
    p.grad = g
    opt.step()
    assert same_bits(opt.state[p]["exp_avg"], g.float() + 0.0)  # 0 + -0 is 0


@pytest.mark.parametrize("dtype", HALVES)
def test_a_store_rounds_to_nearest_even(dtype: torch.dtype) -> None:
    near = all_patterns(dtype).float().view(torch.int32)
    spacing = 1 << (16 if dtype == torch.bfloat16 else 13)
    steps = [0, 1, -1, spacing // 2, spacing // 2 - 1, spacing // 2 + 1, spacing - 1, spacing // 4]
    subnormal = torch.linspace(-(2.0**-13), 2.0**-13, 100_001).view(torch.int32)  # of fp16
    g = torch.cat([*(near + step for step in steps), subnormal]).view(torch.float32)
    p = torch.nn.Parameter(torch.zeros_like(g))
    opt = danlu.Lion([p], betas=(0.0, 0.0), state_dtype=dtype, backend="cpu")
    p.grad = g
    opt.step()
    assert same_bits(opt.state[p]["exp_avg"], (g + 0.0).to(dtype))


@pytest.mark.parametrize("storage", STORAGES, ids=lambda s: s.id)
def test_nothing_is_written_beyond_a_tensor(storage: Storage) -> None:
    """Around every size of a vector's tail, and of a buffer's."""
    for size in (*range(1, 36), *range(1020, 1034)):
        p = torch.nn.Parameter(guarded(size, storage.param))
        opt = danlu.AdamW([p], state_dtype=storage.moment, backend="cpu")
        set_gradient(p, torch.ones(size, dtype=storage.grad))
        opt.step()
        arrays = [p.data]
        for name in ("exp_avg", "exp_avg_sq"):
            opt.state[p][name] = guarded(size, opt.state[p][name].dtype)
            arrays.append(opt.state[p][name])
        opt.step()
        for array in arrays:
            room = torch.empty(0, dtype=array.dtype).set_(array.untyped_storage())
            assert (array != GUARD).all(), size
            assert (room[:MARGIN] == GUARD).all(), size
            assert (room[MARGIN + size :] == GUARD).all(), size


GUARD, MARGIN = 77.0, 40


def guarded(size: int, dtype: torch.dtype) -> torch.Tensor:
    """A tensor of ones in the middle of memory that nobody may write."""
    room = torch.full((size + 2 * MARGIN,), GUARD, dtype=dtype)
    view = room[MARGIN : MARGIN + size]
    view.fill_(1)
    return view
