"""Some calls of step() make one on the mean of their gradients."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import danlu
from cases import BF16, F32, values
from danlu.testing import same_bits
from oracles.itself import normwise
from oracles.jax_optimizers import Run, trajectories
from training import all_same, copies, everything, give_gradients, parameters, some_params, train
from wrapped import TORCH

SHAPES = [(5, 3), (7,), (2, 3, 4)]


def params(dtype: torch.dtype = F32) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(values(s, i, wild=False).to(dtype)) for i, s in enumerate(SHAPES)]


def test_one_step_on_the_mean(make: Callable[..., Any]) -> None:
    """Of gradients whose sums are exact: the same bits, through several steps."""
    opt, once = danlu.GradientAccumulation(make(params()), 4), make(params())
    for t in range(3):
        gradients = [
            [torch.round(64 * values(s, 9 * t + i + 70 * j, wild=False)) for i, s in enumerate(SHAPES)]
            for j in range(4)
        ]
        for some in gradients:
            for p, g in zip(parameters(opt), some, strict=True):
                p.grad = g.clone()
            opt.step()
            for p, g in zip(parameters(opt), some, strict=True):
                assert torch.equal(p.grad, g)  # type: ignore[arg-type]
                p.grad = None  # may be dropped
            assert opt.stepped == (some is gradients[-1])
        for i, p in enumerate(parameters(once)):
            p.grad = torch.stack([some[i] for some in gradients]).mean(0)
        once.step()
    assert all_same(everything(opt), everything(once))


def test_one_step_on_any_mean(make: Callable[..., Any]) -> None:
    """Of three gradients, which fp32 cannot average exactly."""
    opt, once = danlu.GradientAccumulation(make(params()), 3), make(params())
    for j in range(3):
        give_gradients(parameters(opt), j)
        opt.step()
    for i, p in enumerate(parameters(once)):
        p.grad = sum(values(p.shape, 100 * j + i, wild=False).double() for j in range(3)).div(3).float()  # type: ignore[union-attr]
    once.step()
    assert all(normwise(a, b) < 2e-6 for a, b in zip(everything(opt), everything(once), strict=True))


def test_no_step_before_the_last(make: Callable[..., Any]) -> None:
    """Not a phantom first one; moments, counters and parameters stay."""
    opt = danlu.GradientAccumulation(make(params()), 3)
    start = [p.detach().clone() for p in parameters(opt)]
    for t in range(2):
        give_gradients(parameters(opt), t)
        opt.step()
        assert not opt.stepped
        assert not opt.state
    assert all(torch.equal(p, q) for p, q in zip(parameters(opt), start, strict=True))


@pytest.mark.parametrize("taken", [1, 2])
def test_the_last_group_may_be_small(make: Callable[..., Any], taken: int) -> None:
    """flush() steps on the mean of what there is, and on nothing it does nothing."""
    opt, once = danlu.GradientAccumulation(make(params()), 4), make(params())
    assert not opt.flush()
    for _ in range(taken):
        give_gradients(parameters(opt), 5)
        opt.step()
    assert opt.flush()
    assert opt.stepped
    assert not opt.flush()
    give_gradients(parameters(once), 5)
    once.step()
    assert all_same(everything(opt), everything(once))  # of equal gradients, scaled by powers of two


def test_parameters_without_gradients(make: Callable[..., Any]) -> None:
    """One without any does not advance; one that has some is divided by all calls."""
    opt, once = danlu.GradientAccumulation(make(params()), 2), make(params())
    for t in range(3):
        for j in range(2):
            give_gradients(parameters(opt), t)
            parameters(opt)[0].grad = None
            if j == t % 2:
                parameters(opt)[1].grad = None
            opt.step()
        give_gradients(parameters(once), t)
        parameters(once)[0].grad = None
        parameters(once)[1].grad /= 2  # type: ignore[operator]
        once.step()
    assert all_same(everything(opt), everything(once))


@pytest.mark.parametrize("backend", ["cpu", "reference", "cuda"])
def test_what_an_earlier_mean_held_is_gone(backend: str, cuda: Any) -> None:
    """Even a NaN."""
    p = torch.nn.Parameter(torch.ones(100))
    opt = danlu.GradientAccumulation(danlu.AdamW([p], backend=backend), 2)
    p.grad = torch.full_like(p, float("nan"))
    opt.step()
    opt.flush()
    assert p.isnan().all()
    p.data.fill_(1.0)
    for held in opt.state[p].values():
        held.zero_()
    for _ in range(2):
        p.grad = torch.ones_like(p)
        opt.step()
    assert not p.isnan().any()


@pytest.mark.parametrize("name", TORCH)
def test_16_bits(name: str) -> None:
    """The mean is fp32: small gradients count beside a large one; the parameter's .grad stays what it was."""
    for make, takes_fp32, wrap in (
        (danlu.Lion, True, lambda opt: opt),
        (danlu.Lion, True, danlu.EMA),
        (TORCH[name], False, lambda opt: opt),
        (TORCH[name], False, danlu.EMA),
    ):
        p = torch.nn.Parameter(torch.ones(3, dtype=BF16))
        inner = make([p])
        opt = danlu.GradientAccumulation(wrap(inner), 3)
        seen: list[torch.Tensor] = []
        inner.register_step_pre_hook(lambda *_, seen=seen, p=p: seen.append(p.grad.clone()))
        for g in (256.0, 1.0, 1.0):
            p.grad = torch.full_like(p, g)
            opt.step()
        assert seen[0].dtype == (F32 if takes_fp32 else BF16)
        assert (seen[0].float() - 86.0).abs().max() < (1e-4 if takes_fp32 else 0.3)
        assert p.grad.dtype == BF16
        assert p.grad_dtype == BF16  # type: ignore[attr-defined]
        (p * 2).sum().backward()


def test_a_step_that_fails_can_be_repeated() -> None:
    """Nothing of the gradients is lost."""
    opt, once = danlu.GradientAccumulation(danlu.AdamW(some_params()), 2), danlu.AdamW(some_params())
    give_gradients(parameters(opt), 1)
    opt.step()
    exp_avg = opt.state[parameters(opt)[1]]["exp_avg"] = torch.zeros(99)
    give_gradients(parameters(opt), 1)
    gradients = [p.grad for p in parameters(opt)]
    with pytest.raises(ValueError, match="state 'exp_avg' has shape"):
        opt.step()
    assert not opt.stepped
    assert all(p.grad is g for p, g in zip(parameters(opt), gradients, strict=True))
    with pytest.raises(RuntimeError, match=r"flush\(\) repeats it"):
        opt.step()
    assert opt.state[parameters(opt)[1]].pop("exp_avg") is exp_avg
    assert opt.flush()
    give_gradients(parameters(once), 1)
    once.step()
    assert all_same(everything(opt), everything(once))


def test_a_flush_that_fails_can_be_repeated() -> None:
    """And scales the mean once."""
    opt, once = danlu.GradientAccumulation(danlu.AdamW(some_params()), 4), danlu.AdamW(some_params())
    for o in (opt, once):
        give_gradients(parameters(o), 1)
        o.step()
    opt.state[parameters(opt)[1]]["exp_avg"] = torch.zeros(99)
    with pytest.raises(ValueError, match="state 'exp_avg' has shape"):
        opt.flush()
    opt.state[parameters(opt)[1]].pop("exp_avg")
    assert opt.flush()
    for p, q in zip(parameters(opt), parameters(once), strict=True):
        assert torch.equal(opt.state[p]["exp_avg_sq"], once.state[q]["exp_avg_sq"])


def test_a_parameter_that_takes_no_part_for_a_cycle(make: Callable[..., Any]) -> None:
    """Neither its old mean is stepped nor a gradient that was not accumulated."""
    opt = danlu.GradientAccumulation(make(params()), 3)
    for t in range(3):
        give_gradients(parameters(opt), t)
        opt.step()
    still = parameters(opt)[1]
    before = still.detach().clone()
    give_gradients(parameters(opt), 3)
    still.grad = None
    opt.step()
    still.grad = torch.ones_like(still)
    assert opt.flush()
    assert torch.equal(still, before)


@pytest.mark.parametrize("kind", [danlu.AdamW, torch.optim.SGD])
def test_maximize_counts_once(kind: type[torch.optim.Optimizer]) -> None:
    opt = danlu.GradientAccumulation(kind(params(), lr=0.1, maximize=True), 2)  # type: ignore[call-arg]
    once = kind(params(), lr=0.1, maximize=True)  # type: ignore[call-arg]
    for _ in range(2):
        give_gradients(parameters(opt), 1)
        opt.step()
    give_gradients(parameters(once), 1)
    once.step()
    assert all_same(everything(opt), everything(once))


@pytest.mark.parametrize("position", [-1, 6, 1.0, True, "2"])
def test_positions_out_of_the_cycle(position: object) -> None:
    opt = danlu.GradientAccumulation(danlu.Lion(some_params()), 5)
    train(opt, range(2))
    before = copies(opt)
    saved = opt.state_dict()
    saved["param_groups"][0]["accumulated_steps"] = position
    with pytest.raises(
        ValueError, match=r"^accumulated_steps must be an integer from 0 to 5 \(accumulated_of\), got"
    ):
        opt.load_state_dict(saved)
    assert opt.position == 2
    assert all_same(copies(opt), before)


def test_the_same_is_saved_everywhere_in_a_cycle() -> None:
    """A distributed checkpoint reads the keys that it finds in the optimizer to be loaded."""
    opt = danlu.GradientAccumulation(danlu.Lion(some_params()), 2)
    for t in range(4):
        give_gradients(parameters(opt), t)
        opt.step()
        keys = {"mean_grad", "mean_grad_step"} | ({"exp_avg", "step"} if t else set())
        assert all(state.keys() == keys for state in opt.state_dict()["state"].values())
        assert opt.state_dict()["state"][0]["mean_grad_step"] == (t + 1) % 2


def test_as_optax_has_it(tmp_path: Path) -> None:
    """optax.MultiSteps around Adam, in float64."""
    start, gradients = values((20,), 0, wild=False).double(), values((12, 20), 1, wild=False).double()
    p = torch.nn.Parameter(start.clone())
    opt = danlu.GradientAccumulation(danlu.Adam([p], lr=1e-2), 3)
    (theirs,) = trajectories(
        tmp_path, [Run("accumulated_adam", start.numpy(), gradients.numpy(), [1e-2] * 12, dict(steps=3))]
    )
    for g, want in zip(gradients, theirs["p"], strict=True):
        p.grad = g.clone()
        opt.step()
        assert (p.detach() - torch.from_numpy(want)).abs().max() < 1e-9  # it divides by fp32 counts


def test_gradients_are_only_read(make: Callable[..., Any]) -> None:
    opt = danlu.GradientAccumulation(make(params()), 2)
    give_gradients(parameters(opt), 0)
    kept = [p.grad for p in parameters(opt)]
    before = [g.clone() for g in kept if g is not None]
    for _ in range(3):
        opt.step()
    assert all(p.grad is g for p, g in zip(parameters(opt), kept, strict=True))
    assert all(same_bits(a, b) for a, b in zip(before, kept, strict=True))  # type: ignore[arg-type]


@pytest.mark.parametrize("steps", [8, 4, 3, 2])
@pytest.mark.parametrize("taken", [1, 3])
def test_resumed_with_other_steps(steps: int, taken: int) -> None:
    """The mean of gradients of 1 is 1, by flush() and by the gradients that are missing."""

    def resumed() -> danlu.GradientAccumulation:
        opt = danlu.GradientAccumulation(torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=1.0), 4)
        for _ in range(taken):
            parameters(opt)[0].grad = torch.ones(2)
            opt.step()
        loaded = danlu.GradientAccumulation(
            torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=1.0), steps
        )
        loaded.load_state_dict(opt.state_dict())
        return loaded

    opt = resumed()
    assert opt.flush()
    assert parameters(opt)[0].tolist() == pytest.approx([-1.0, -1.0])
    opt = resumed()
    parameters(opt)[0].grad = torch.ones(2)
    if taken < steps:
        for i in range(taken, steps):
            assert parameters(opt)[0].tolist() == [0.0, 0.0]
            opt.step()
            assert opt.stepped == (i + 1 == steps)
    else:
        with pytest.raises(RuntimeError, match=r"flush\(\) repeats it"):
            opt.step()
        assert opt.flush()
    assert parameters(opt)[0].tolist() == pytest.approx([-1.0, -1.0])


@pytest.mark.parametrize("name", ["danlu", *TORCH])
def test_a_model_may_change_its_dtype(name: str) -> None:
    """Gradients then have the new one: nothing is said about it by what accumulation gave."""
    p = torch.nn.Parameter(torch.ones(3, dtype=BF16))
    opt = danlu.GradientAccumulation(danlu.Lion([p]) if name == "danlu" else TORCH[name]([p]), 2)
    for _ in range(2):
        p.grad = torch.ones_like(p)
        opt.step()
    opt.zero_grad()
    p.data = p.data.float()
    (p * 1.001).sum().backward()
    assert p.grad is not None
    assert p.grad.dtype == F32


def test_a_dtype_of_gradients_that_the_user_chose_stays() -> None:
    for kind in (danlu.Lion, torch.optim.SGD):
        p = torch.nn.Parameter(torch.ones(3, dtype=BF16))
        p.grad_dtype = F32  # type: ignore[attr-defined]
        opt = danlu.GradientAccumulation(kind([p], lr=0.1), 2)  # type: ignore[operator]
        for _ in range(2):
            p.grad = torch.full((3,), 1.001)
            opt.step()
        assert p.grad_dtype == F32  # type: ignore[attr-defined]
        assert p.grad.dtype == F32  # type: ignore[union-attr]


@pytest.mark.parametrize("where", ["inside", "outside"])
def test_a_hook_that_raises_after_the_update(make: Callable[..., Any], where: str) -> None:
    """The update was made: flush() does not repeat it."""
    opt, once = danlu.GradientAccumulation(make(params()), 2), danlu.GradientAccumulation(make(params()), 2)

    def fail(*_: object) -> None:
        raise ZeroDivisionError

    handle = (opt.optimizer if where == "inside" else opt).register_step_post_hook(fail)
    for t in range(2):
        give_gradients(parameters(opt), t)
        try:
            opt.step()
        except ZeroDivisionError:
            assert where == "outside" or t == 1
    handle.remove()
    assert not opt.flush()
    for t in range(2):
        give_gradients(parameters(once), t)
        once.step()
    assert all_same(everything(opt), everything(once))


def test_a_hook_that_raises_before_the_update() -> None:
    """It was not made: flush() makes it."""
    opt, once = (danlu.GradientAccumulation(danlu.AdamW(params()), 2) for _ in range(2))

    def fail(*_: object) -> None:
        raise ZeroDivisionError

    handle = opt.optimizer.register_step_pre_hook(fail)
    give_gradients(parameters(opt), 0)
    opt.step()
    with pytest.raises(ZeroDivisionError):
        train(opt, range(1, 2))
    handle.remove()
    assert opt.flush()
    train(once, range(2))
    assert all_same(everything(opt), everything(once))
