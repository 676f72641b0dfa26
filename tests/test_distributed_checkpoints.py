"""Checkpoints by torch.distributed.checkpoint and by torchtitan, of wrappers in one process."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import state_dict as dcp

import danlu
from oracles import submodules
from taken_apart import INSIDE, all_of, wrappings_around
from training import all_same, give_gradients, some_params
from wrapped import Wrapping

pytestmark = pytest.mark.usefixtures("one_thread")

# its wheels are for Python 3.11 and newer
HAS_TITAN = sys.version_info >= (3, 11)
titan: Any = submodules.load("torchtitan.components.optimizer.utils") if HAS_TITAN else None


class Torch:
    """torch.distributed.checkpoint."""

    def __init__(self, *, flat: bool) -> None:
        self.options = dcp.StateDictOptions(flatten_optimizer_state_dict=flat)

    def save(self, model: torch.nn.Module, opt: Any) -> Any:
        return copy.deepcopy(dcp.get_optimizer_state_dict(model, opt, options=self.options))

    def load(self, model: torch.nn.Module, opt: Any, saved: Any) -> None:
        dcp.set_optimizer_state_dict(model, opt, saved, options=self.options)


class Titan:
    """What torchtitan's OptimizersContainer calls in its state_dict and load_state_dict."""

    def save(self, model: torch.nn.Module, opt: Any) -> Any:
        titan.init_optim_state(opt)
        return copy.deepcopy(titan.get_flat_optim_state_dict(opt))

    def load(self, model: torch.nn.Module, opt: Any, saved: Any) -> None:
        titan.init_optim_state(opt)
        titan.load_flat_optim_state_dict(opt, saved)


WAYS: dict[str, Any] = {"torch": Torch(flat=False), "flat": Torch(flat=True)}
if HAS_TITAN:
    WAYS["titan"] = Titan()


@pytest.fixture(params=wrappings_around(INSIDE, 3), ids=lambda x: f"{x[1].id}-{x[0]}")
def make(request: pytest.FixtureRequest) -> Callable[[torch.nn.Module], Any]:
    """What makes a wrapper around an optimizer of a model."""
    name, wrapping = request.param
    return lambda model: wrapping.make(INSIDE[name](model.named_parameters()))


@pytest.fixture
def period(request: pytest.FixtureRequest) -> int:
    wrapping: Wrapping = request.node.callspec.params["make"][1]
    return wrapping.period


def some_model() -> torch.nn.Module:
    return torch.nn.ParameterList(some_params(2))


def train(model: torch.nn.Module, opt: Any, t: int) -> None:
    opt.zero_grad()
    give_gradients(model.parameters(), t)
    opt.step()


@pytest.mark.parametrize("cleared", [True, False], ids=["cleared", "gradients"])
def test_goes_on_from_every_point_of_a_cycle(make: Any, period: int, cleared: bool) -> None:
    """To the same bits, in another one and in the one that was saved.

    `cleared`: there are no gradients when it is saved, and the other one has taken a gradient before.
    """
    end = 2 * period
    whole = some_model()
    expected = make(whole)
    for t in range(end):
        train(whole, expected, t)
    for name, way in WAYS.items():
        for begin in range(period + 1):
            model, fresh = some_model(), some_model()
            opt, resumed = make(model), make(fresh)
            for t in range(begin):
                train(model, opt, t)
            if cleared:
                opt.zero_grad()
                train(fresh, resumed, 50)
                resumed.zero_grad()
            saved = way.save(model, opt)
            way.load(fresh, resumed, copy.deepcopy(saved))
            keys = way.save(fresh, resumed).keys()
            assert keys == saved.keys()  # a reader asks for those of the optimizer that is to load them
            fresh.load_state_dict(copy.deepcopy(model.state_dict()))
            for t in range(begin, end):
                train(model, opt, t)
                train(fresh, resumed, t)
            assert all_same(all_of(opt), all_of(expected)), (name, begin)
            assert all_same(all_of(resumed), all_of(expected)), (name, begin)


def test_saved_while_weights_for_evaluation_are_in_place(make: Any, period: int) -> None:
    """A plain state_dict has those for training, too; a distributed one would lose them and is refused."""
    end = 2 * period
    whole = some_model()
    expected = make(whole)
    for t in range(end):
        train(whole, expected, t)
    for begin in range(period + 1):
        model, fresh = some_model(), some_model()
        opt, resumed = make(model), make(fresh)
        for t in range(begin):
            train(model, opt, t)
        before = copy.deepcopy(model.state_dict())
        opt.eval()
        moved = any(key in held for held in opt.state_dict()["state"].values() for key in ("raw", "fast"))
        saved = copy.deepcopy((model.state_dict(), opt.state_dict()))
        for way in WAYS.values() if moved else ():
            with pytest.raises(RuntimeError, match=r"call train\(\) before"):
                way.save(model, opt)
        fresh.load_state_dict(saved[0])
        resumed.load_state_dict(saved[1])
        opt.train()
        resumed.train()
        assert all_same(list(model.parameters()), list(before.values()))
        for t in range(begin, end):
            train(model, opt, t)
            train(fresh, resumed, t)
        assert all_same(all_of(opt), all_of(expected)), begin
        assert all_same(all_of(resumed), all_of(expected)), begin


@pytest.mark.parametrize("wrap", [danlu.EMA, danlu.Lookahead])
@pytest.mark.parametrize("way", WAYS)
def test_sparse_gradients_are_there_before_the_first_step(wrap: Callable[[Any], Any], way: str) -> None:
    """The state is made without them, and they are there for the step."""
    results = []
    for asked in (True, False):
        model = torch.nn.Embedding.from_pretrained(torch.ones(5, 2), freeze=False, sparse=True)
        opt = wrap(torch.optim.SparseAdam(model.named_parameters(), lr=0.1))
        model(torch.tensor([1, 3])).sum().backward()
        if asked:
            before = model.weight.grad
            saved = WAYS[way].save(model, opt)
            flat = saved if "state" not in saved else saved["state"]["weight"]
            assert any(key.endswith("exp_avg") for key in flat)
            assert model.weight.grad is before
        opt.step()
        results.append(all_of(opt))
    assert all_same(*results)
