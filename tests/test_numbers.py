"""Arithmetic that went wrong elsewhere, checked against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

import danlu
from cases import BF16, CASES, F16, F32, Case
from danlu.testing import same_bits

INF, NAN = float("inf"), float("nan")
SIGN_RULES = [danlu.Lion, danlu.Tiger]


def one_step(opt_type: type, start: torch.Tensor, gradient: torch.Tensor, **hyper: object) -> torch.Tensor:
    p = torch.nn.Parameter(start.clone())
    p.grad = gradient
    opt_type([p], **hyper).step()
    return p.detach()


@pytest.mark.parametrize("optimizer", SIGN_RULES)
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_a_zero_gradient_does_not_move_a_parameter(optimizer: type, dtype: torch.dtype, backend: str) -> None:
    start = torch.tensor([1.0, -2.0, 0.0, -0.0], dtype=dtype)
    for zero in (0.0, -0.0):
        got = one_step(
            optimizer, start, torch.full_like(start, zero), lr=0.5, weight_decay=0.0, backend=backend
        )
        assert same_bits(got, start)


@pytest.mark.parametrize("optimizer", SIGN_RULES)
def test_signs(optimizer: type, backend: str) -> None:
    gradient = torch.tensor([3.0, -1e-30, INF, -INF, NAN])
    got = one_step(optimizer, torch.zeros(5), gradient, lr=0.5, weight_decay=0.0, backend=backend)
    assert same_bits(got, torch.tensor([-0.5, 0.5, -0.5, 0.5, NAN]))


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_a_nan_gradient_shows(case: Case, backend: str) -> None:
    p = torch.nn.Parameter(torch.ones(100))
    opt = case.make([p], backend=backend)
    for _ in range(3):
        p.grad = torch.ones(100)
        p.grad[37] = NAN
        opt.step()
    assert p.isnan().nonzero().tolist() == [[37]]


@pytest.mark.parametrize("optimizer", [danlu.Lion, danlu.Tiger, danlu.AdamW, danlu.AdaXW])
def test_small_decay_is_not_rounded_away(optimizer: type, backend: str) -> None:
    start = torch.rand(200_000, generator=torch.Generator().manual_seed(0)) + 1.0
    lr, weight_decay = 1e-4, 1e-2

    def lost(p: torch.Tensor) -> float:
        return ((start.double() - p.double()) / start.double()).mean().item() / (lr * weight_decay)

    hyper = dict(lr=lr, weight_decay=weight_decay, backend=backend)
    assert lost(one_step(optimizer, start, torch.zeros_like(start), **hyper)) == pytest.approx(1, abs=0.004)
    # the usual form, whose coefficient fp32 cannot hold
    assert lost(start * (1 - lr * weight_decay)) == pytest.approx(1.0133, abs=0.004)


def test_decay_and_update_are_rounded_together(backend: str) -> None:
    """In bf16 each of the two alone rounds to nothing here; their sum does not."""
    spacing = 2.0**-8  # of bf16 below 1
    start = torch.ones(8, dtype=BF16)
    lr = 0.3 * spacing / 2
    hyper = dict(lr=lr, weight_decay=1.0, backend=backend)
    assert (one_step(danlu.Lion, start, torch.ones(8, dtype=BF16), **hyper) == 1 - spacing / 2).all()
    assert (one_step(danlu.Lion, start, torch.zeros(8, dtype=BF16), **hyper) == 1).all()


def test_lr_is_not_rounded_to_the_storage_dtype(backend: str) -> None:
    p = torch.nn.Parameter(torch.zeros(4, dtype=BF16))
    p.grad_dtype = BF16  # type: ignore[attr-defined]
    opt = danlu.Tiger([p], lr=1e-3, beta=0.0, weight_decay=0.0, state_dtype=F32, backend=backend)
    p.grad = torch.ones(4, dtype=BF16)
    opt.step()
    assert p[0].item() == torch.tensor(-1e-3).to(BF16).item()
    fp32 = one_step(danlu.Tiger, torch.zeros(4), torch.ones(4), lr=1e-3, weight_decay=0.0, backend=backend)
    assert fp32[0].item() == -torch.tensor(1e-3).item()


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_second_moments_keep_moving_in_low_precision(dtype: torch.dtype, backend: str) -> None:
    """An average kept in bf16 stops some hundred steps after a change of the gradient's size."""
    p = torch.nn.Parameter(torch.zeros(4, dtype=dtype))
    opt = danlu.AdamW([p], lr=0.0, betas=(0.9, 0.999), state_dtype=BF16, backend=backend)
    for _ in range(1000):
        p.grad = torch.ones(4, dtype=dtype)
        opt.step()
    v = opt.state[p]["exp_avg_sq"]
    assert v.dtype == F32
    assert v[0].item() == pytest.approx(1 - 0.999**1000, rel=1e-4)


def test_float64_stays_float64() -> None:
    p = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    opt = danlu.AdamW([p], lr=0.1)
    p.grad = torch.full((3,), 1 / 3, dtype=torch.float64)
    opt.step()
    assert opt.state[p]["exp_avg"].dtype == opt.state[p]["exp_avg_sq"].dtype == torch.float64
    assert opt.state[p]["exp_avg_sq"][0].item() == pytest.approx(0.001 / 9, rel=1e-14)
    (row,) = opt.backend_report()
    assert row.backend == "reference"
    assert "float64" in row.reason


def test_adam_with_eps_zero(backend: str) -> None:
    got = one_step(danlu.AdamW, torch.ones(2), torch.tensor([1e-20, -3.0]), lr=0.5, eps=0.0, backend=backend)
    want = [1 - 0.5 * 1 - 0.5 * 0.01, 1 + 0.5 - 0.5 * 0.01]
    assert math.isclose(got[1].item(), want[1], rel_tol=1e-6)
    assert got[0].isfinite() or got[0] == -INF  # (1e-20)^2 underflows in fp32, as in torch
