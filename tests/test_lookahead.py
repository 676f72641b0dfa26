"""Slow weights that follow the fast ones."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

import danlu
from cases import BF16, values
from oracles.itself import normwise
from oracles.jax_optimizers import Run, trajectories
from training import all_same, everything, give_gradients, parameters, some_params, train
from wrapped import MAKERS


def slow_weights(opt: danlu.Lookahead) -> list[torch.Tensor]:
    return [opt.state_dict()["state"][i]["slow"].clone() for i in range(len(parameters(opt)))]


@pytest.mark.parametrize("name", MAKERS)
def test_the_formula(name: str) -> None:
    """In float64, around everything; the first cycle is right, and the optimizer's state is kept."""
    start = [p.double() for p in some_params()]
    make = MAKERS[name]
    opt = danlu.Lookahead(make([torch.nn.Parameter(p.clone()) for p in start]), k=3, alpha=0.4)
    plain = make([torch.nn.Parameter(p.clone()) for p in start])
    slow = [p.detach().clone() for p in start]
    for t in range(10):
        for i, (p, q) in enumerate(zip(parameters(opt), parameters(plain), strict=True)):
            p.grad = values(p.shape, 100 * t + i, wild=False).double()
            q.grad = p.grad.clone()
        opt.step()
        plain.step()
        if t % 3 == 2:
            with torch.no_grad():
                for s, q in zip(slow, parameters(plain), strict=True):
                    s += 0.4 * (q - s)
                    q.copy_(s)
        assert all(normwise(a, b) < 1e-14 for a, b in zip(everything(opt), everything(plain), strict=True)), t
    assert all(normwise(a, b) < 1e-14 for a, b in zip(slow_weights(opt), slow, strict=True))


def test_as_optax_has_it(tmp_path: Path) -> None:
    start, gradients = values((20,), 0, wild=False).double(), values((12, 20), 1, wild=False).double()
    p = torch.nn.Parameter(start.clone())
    opt = danlu.Lookahead(danlu.Adam([p], lr=1e-2), k=4, alpha=0.3)
    hyper = dict(k=4, alpha=0.3)
    (theirs,) = trajectories(
        tmp_path, [Run("lookahead_adam", start.numpy(), gradients.numpy(), [1e-2] * 12, hyper)]
    )
    for g, want in zip(gradients, theirs["p"], strict=True):
        p.grad = g.clone()
        opt.step()
        assert (p.detach() - torch.from_numpy(want)).abs().max() < 1e-14
    assert (slow_weights(opt)[0] - torch.from_numpy(theirs["slow"])).abs().max() < 1e-14


def test_eval_and_train() -> None:
    opt = danlu.Lookahead(danlu.Lion(some_params(), lr=0.1), k=3)
    reference = copy.deepcopy(opt)
    for t in range(5):
        train(opt, [t])
        train(reference, [t])
        fast = [p.detach().clone() for p in parameters(opt)]
        slow = slow_weights(opt)
        opt.eval()
        opt.eval()
        assert all(torch.equal(p, s) for p, s in zip(parameters(opt), slow, strict=True))
        with pytest.raises(RuntimeError, match="slow weights are in place"):
            opt.step()
        opt.train()
        opt.train()
        assert all(torch.equal(p, q) for p, q in zip(parameters(opt), fast, strict=True))
    assert all_same(everything(opt), everything(reference))


def test_a_copy_made_in_between_has_the_fast_weights_too() -> None:
    opt = danlu.Lookahead(danlu.Lion(some_params(), lr=0.1), k=3)
    train(opt, range(2))
    fast = [p.detach().clone() for p in parameters(opt)]
    opt.eval()
    for other in (copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
        other.train()
        assert all(torch.equal(p, q) for p, q in zip(parameters(other), fast, strict=True))
    assert not torch.equal(parameters(opt)[0], fast[0])


def test_every_step_counts() -> None:
    """One without any gradient, and one with an lr of 0, which does not hold the slow weights."""
    opt = danlu.Lookahead(danlu.Lion(some_params(), lr=0.1), k=3)
    start = [p.detach().clone() for p in parameters(opt)]
    train(opt, range(1))
    fast = [p.detach().clone() for p in parameters(opt)]
    opt.zero_grad()
    opt.step()
    assert all(torch.equal(p, q) for p, q in zip(parameters(opt), fast, strict=True))
    opt.param_groups[0]["lr"] = 0.0
    train(opt, range(1))
    for p, first, q in zip(parameters(opt), start, fast, strict=True):
        torch.testing.assert_close(p.detach(), (first + q) / 2)


def test_eval_before_the_first_step() -> None:
    opt = danlu.Lookahead(danlu.Lion(some_params()))
    before = [p.detach().clone() for p in parameters(opt)]
    opt.eval()
    assert all(torch.equal(p, q) for p, q in zip(parameters(opt), before, strict=True))
    opt.train()


def test_weights_that_are_loaded_after_an_evaluation() -> None:
    """Before the first step these are where the slow weights start."""
    p = torch.nn.Parameter(torch.tensor([0.0]))
    opt = danlu.Lookahead(danlu.Lion([p], lr=1.0), k=1, alpha=0.5)
    opt.eval()
    opt.train()
    p.data.fill_(10.0)
    p.grad = torch.tensor([-1.0])
    opt.step()
    assert p.item() == 10.5


def test_slow_weights_of_bf16_parameters_are_fp32() -> None:
    """Steps of the slow weights that bf16 rounds away add up."""
    p = torch.nn.Parameter(torch.full((4,), 256.0, dtype=BF16))
    opt = danlu.Lookahead(torch.optim.SGD([p], lr=1.0), k=1, alpha=0.125)
    for _ in range(8):
        p.grad = torch.full_like(p, -2.0)
        opt.step()
    slow = opt.state_dict()["state"][0]["slow"]
    assert slow.dtype == torch.float32
    assert slow[0] > 257


@pytest.mark.parametrize("backend", ["cpu", "reference", "cuda"])
def test_a_parameter_that_joins_late(backend: str, cuda: Any) -> None:
    """Has slow weights from then on: they are where it is, not at 0; one without a gradient stays."""
    opt = danlu.Lookahead(danlu.Lion(some_params(), lr=0.1, backend=backend), k=2)
    train(opt, range(3))
    late, still = torch.nn.Parameter(torch.full((3,), 8.0)), torch.nn.Parameter(torch.full((3,), 5.0))
    opt.add_param_group({"params": [late, still]})
    give_gradients(parameters(opt), 3)
    still.grad = None
    opt.step()
    assert torch.equal(late, 8.0 - 0.05 * late.grad.sign()) or (late - 8.0).abs().max() < 0.06  # type: ignore[union-attr]
    assert (late - 8.0).abs().min() > 0.04
    assert torch.equal(still, torch.full((3,), 5.0))


def test_a_parameter_that_takes_anothers_place() -> None:
    """As trainers do; the new one's slow weights are its own."""
    opt = danlu.Lookahead(danlu.Lion(some_params(1), lr=0.1), k=2)
    train(opt, range(1))
    new = torch.nn.Parameter(torch.full((4, 1), 8.0))
    opt.param_groups[0]["params"][0] = new
    train(opt, range(1, 2))
    assert (new - 8.0).abs().max() < 0.11
