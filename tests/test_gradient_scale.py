"""GradScaler and clipping: what multiplies the gradients of a step."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import danlu
from cases import ALL, Case, set_gradient, values
from training import (
    all_same,
    check_found_inf,
    copies,
    everything,
    give_gradients,
    parameters,
    some_params,
    train,
)

SCALE = 1024.0  # a power of two: unscaling rounds nothing
every_case = pytest.mark.parametrize("case", ALL, ids=lambda c: c.id)


@pytest.mark.pairs
@every_case
@pytest.mark.parametrize("max_norm", [0.1, 1e6], ids=["clips", "does not"])
def test_max_grad_norm_clips_over_all_groups(case: Case, max_norm: float, backend: str) -> None:
    def make(**engine: Any) -> danlu.FusedOptimizer:
        a, b, c = some_params()
        return case.make([{"params": [a]}, {"params": [b, c], "lr": 0.01}], backend=backend, **engine)

    inside, outside, by_torch = make(max_grad_norm=max_norm), make(), make()
    for t in range(4):
        give_gradients(parameters(inside), t)
        given = [p.grad.clone() for p in parameters(inside) if p.grad is not None]
        inside.step()
        assert all_same([p.grad for p in parameters(inside) if p.grad is not None], given)
        norm = sum(g.double().square().sum().item() for g in given) ** 0.5
        for p, g in zip(parameters(outside), given, strict=True):
            p.grad = g * (1 / max(1.0, norm / max_norm))
        outside.step()
        give_gradients(parameters(by_torch), t)
        torch.nn.utils.clip_grad_norm_(parameters(by_torch), max_norm)
        by_torch.step()
    for a, b, c in zip(everything(inside), everything(outside), everything(by_torch), strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-8)
        assert torch.allclose(a, c, rtol=1e-4, atol=1e-7)  # torch adds 1e-6 to the norm


def scaler_step(opt: torch.optim.Optimizer, unscale: bool) -> torch.amp.GradScaler:
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE, growth_interval=1000)
    scaler.scale(torch.zeros(()))  # makes the scale tensor
    if unscale:
        scaler.unscale_(opt)
    scaler.step(opt)
    scaler.update()
    return scaler


@pytest.mark.pairs
@pytest.mark.parametrize("unscale", [False, True], ids=["step", "unscale_ and step"])
@pytest.mark.parametrize("fused", [None, True])
@every_case
def test_a_grad_scaler_changes_no_bit(case: Case, fused: bool | None, unscale: bool) -> None:
    """With clipping too, whose norm is that of the unscaled gradients."""
    for max_norm in (None, 0.5):
        scaled = case.make(some_params(), fused=fused, max_grad_norm=max_norm)
        plain = case.make(some_params(), max_grad_norm=max_norm)
        assert getattr(scaled, "_step_supports_amp_scaling", False) == bool(fused)
        for t in range(4):
            give_gradients(parameters(scaled), t, factor=SCALE)
            scaler_step(scaled, unscale)
        train(plain, range(4))
        assert all_same(everything(scaled), everything(plain))


@pytest.mark.pairs
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("unscale", [False, True], ids=["step", "unscale_ and step"])
@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("started", [0, 4], ids=["first step", "later step"])
@every_case
def test_found_inf_leaves_everything(
    case: Case, started: int, fused: bool | None, unscale: bool, bad: float
) -> None:
    opt = case.make(some_params(), fused=fused, max_grad_norm=0.5)
    train(opt, range(started))
    before, versions = copies(opt), [p._version for p in parameters(opt)]
    give_gradients(parameters(opt), 9, factor=SCALE)
    last = parameters(opt)[-1].grad
    assert last is not None
    last[0, 0] = bad
    scaler = scaler_step(opt, unscale)
    assert scaler.get_scale() == SCALE / 2
    assert all_same(everything(opt), before)
    assert [p._version for p in parameters(opt)] == versions
    train(opt, range(started, 6))
    assert all(held["step"] == 6 // case.hyper.get("accumulation_steps", 1) for held in opt.state.values())


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_found_inf_where_capturable_changes_nothing(backend: str) -> None:
    check_found_inf(danlu.Lion(some_params(), backend=backend, capturable=True))


def squares(gradients: list[torch.Tensor], threads: int = 2) -> float:
    """What the CPU kernels sum, for gradients of their own dtypes."""
    params = [torch.nn.Parameter(torch.zeros_like(g, dtype=torch.float32)) for g in gradients]
    for p, g in zip(params, gradients, strict=True):
        set_gradient(p, g)
    opt = danlu.Lion(params, backend="cpu", max_grad_norm=1.0)
    opt.step()
    assert opt._plan is not None
    (executor,) = opt._plan._executors
    assert executor.refresh(opt)
    torch.set_num_threads(threads)
    try:
        return float(executor.gradient_squares())
    finally:
        executor.release()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_norm_is_that_of_float64_for_any_number_of_threads(dtype: torch.dtype) -> None:
    sizes = [1, 7, 31, 32, 33, 1023, 1025, 65535, 65536, 65537, 3 * 65536 + 11, 0]
    gradients = [values((size,), i, wild=False).to(dtype) for i, size in enumerate(sizes)]
    gradients.append(values((999,), 50, wild=False).to(dtype)[1:])  # misaligned
    exact = math.fsum(x * x for g in gradients for x in g.double().tolist())
    results = {squares(gradients, threads) for threads in (1, 2, 3, 8)}
    assert len(results) == 1
    assert abs(results.pop() - exact) <= 1e-14 * exact


@pytest.mark.parametrize("value", [1e-45, 1e-30, 3e38])
def test_the_norm_of_tiny_and_huge_gradients(value: float) -> None:
    """Squares that fp32 could not hold."""
    gradients = [torch.full((1000,), value)]
    exact = 1000 * float(gradients[0][0].double()) ** 2
    assert abs(squares(gradients) - exact) <= 1e-12 * exact


@pytest.mark.parametrize("at", [0, 31, 32, 100])
def test_what_is_not_finite_shows_in_the_norm(at: int) -> None:
    for value in (float("nan"), float("inf")):
        g = torch.ones(101)
        g[at] = value
        assert not math.isfinite(squares([torch.ones(5), g]))


def test_only_gradients_that_are_there_count() -> None:
    opt = danlu.Lion(some_params(), backend="cpu", max_grad_norm=1.0)
    give_gradients(parameters(opt), 0)
    opt.step()
    parameters(opt)[1].grad = None
    assert opt._plan is not None
    (executor,) = opt._plan._executors
    assert executor.refresh(opt)
    exact = sum(p.grad.double().square().sum().item() for p in parameters(opt) if p.grad is not None)
    assert abs(executor.gradient_squares() - exact) <= 1e-12 * exact
    executor.release()
