"""Averages and slow weights in the parameters' place: steps, checkpoints and nestings meanwhile."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

import danlu
from training import all_same, copies, give_gradients, parameters, some_params, train

AVERAGING: dict[str, Callable[[Any], Any]] = {
    "ema": lambda opt: danlu.EMA(opt, decay=0.8),
    "lookahead": lambda opt: danlu.Lookahead(opt, k=4),
    "accumulation-ema": lambda opt: danlu.GradientAccumulation(danlu.EMA(opt, decay=0.8), 2),
    "ema-lookahead": lambda opt: danlu.EMA(danlu.Lookahead(opt, k=4), decay=0.8),
    "lookahead-ema": lambda opt: danlu.Lookahead(danlu.EMA(opt, decay=0.8), k=4),
    "ema-lazy": lambda opt: danlu.EMA(danlu.Lazy(opt), decay=0.8),
}
INNER: dict[str, Callable[[Any], Any]] = {
    "danlu": lambda params: danlu.AdamW(params, lr=0.1),
    "torch": lambda params: torch.optim.Adam(params, lr=0.1),
}


@pytest.fixture(params=[f"{w}-{i}" for w in AVERAGING for i in INNER if (w, i) != ("ema-lazy", "torch")])
def make(request: pytest.FixtureRequest) -> Callable[[list[torch.nn.Parameter]], Any]:
    wrapping, inner = request.param.rsplit("-", 1)
    return lambda params: AVERAGING[wrapping](INNER[inner](params))


def like(params: list[torch.nn.Parameter]) -> list[torch.nn.Parameter]:
    """As a loaded model has them."""
    return [torch.nn.Parameter(p.detach().clone()) for p in params]


def the_one_that_averages(opt: Any) -> Any:
    return opt.optimizer if isinstance(opt, danlu.GradientAccumulation) else opt


def test_a_state_dict_in_evaluation_resumes_exactly(make: Callable[..., Any]) -> None:
    """What a trainer does that evaluates and saves in the same step; the model is loaded before or after."""
    opt = make(some_params())
    train(opt, range(6))
    training = copies(opt)
    opt.eval()
    shown = like(parameters(opt))
    assert not all_same(list(shown), training[: len(shown)])
    saved = copy.deepcopy(opt.state_dict())
    for model_first in (True, False):
        loaded = make(like(shown) if model_first else some_params())
        loaded.load_state_dict(copy.deepcopy(saved))
        if not model_first:
            with torch.no_grad():
                for p, q in zip(parameters(loaded), shown, strict=True):
                    p.copy_(q)
        give_gradients(parameters(loaded), 6)
        with pytest.raises(RuntimeError, match=r"are in place, a step would train them; train\(\)"):
            loaded.step()
        assert all_same(list(parameters(loaded)), list(shown))
        loaded.train()
        assert all_same(copies(loaded), training)
        other = copy.deepcopy(opt)
        other.train()
        for o in (loaded, other):
            train(o, range(6, 15))
        assert all_same(copies(loaded), copies(other))


def test_a_checkpoint_of_training_loaded_in_evaluation(make: Callable[..., Any]) -> None:
    """The weights of before do not come back over the loaded ones."""
    saving = make(some_params())
    train(saving, range(6))
    saved, weights = copy.deepcopy(saving.state_dict()), like(parameters(saving))
    opt = make(some_params())
    train(opt, range(20, 26))
    opt.eval()
    with torch.no_grad():
        for p, q in zip(parameters(opt), weights, strict=True):
            p.copy_(q)
    opt.load_state_dict(saved)
    opt.train()
    assert all_same(list(parameters(opt)), list(weights))
    for o in (opt, saving):
        train(o, range(6, 15))
    assert all_same(copies(opt), copies(saving))


def test_a_checkpoint_loaded_inside_swap() -> None:
    opt = danlu.EMA(torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.0))
    train(opt, range(1))
    saved = copy.deepcopy(opt.state_dict())
    with opt.swap():
        parameters(opt)[0].data.fill_(7.0)
        opt.load_state_dict(saved)
    assert parameters(opt)[0].tolist() == [7.0, 7.0]


def test_an_optimizer_in_evaluation_loads_and_copies(make: Callable[..., Any]) -> None:
    """A step is refused at once, whoever is outermost: no gradient is taken."""
    opt = make(some_params())
    train(opt, range(6))
    fast = [p.detach().clone() for p in parameters(opt)]
    opt.eval()
    opt.eval()
    before = copies(opt), copy.deepcopy(opt.state_dict())
    for other in (opt, copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
        give_gradients(parameters(other), 9)
        with pytest.raises(RuntimeError, match="in place, a step would train them"):
            other.step()
        assert all_same(copies(other), before[0])
        assert str(other.state_dict()) == str(before[1])
        other.train()
        other.train()
        assert all_same(list(parameters(other)), fast)


def test_a_distributed_checkpoint_in_evaluation_is_refused(make: Callable[..., Any]) -> None:
    """It is read by the keys of an optimizer in training."""
    model = torch.nn.ParameterList(some_params())
    opt = make(model.parameters())
    train(opt, range(6))
    opt.zero_grad()
    opt.eval()
    with pytest.raises(RuntimeError, match=r"call train\(\) before"):
        get_optimizer_state_dict(model, opt)
    opt.train()
    get_optimizer_state_dict(model, opt)


def test_flush_in_evaluation_is_refused() -> None:
    opt = danlu.GradientAccumulation(danlu.EMA(danlu.Lion(some_params())), 3)
    train(opt, range(4))
    opt.eval()
    with pytest.raises(RuntimeError, match="EMA: the averages are in place"):
        opt.flush()
    opt.train()
    assert opt.position == 1
    assert opt.flush()


def test_eval_before_the_first_step(make: Callable[..., Any]) -> None:
    """Trainers evaluate once before they train."""
    opt, plain = make(some_params()), make(some_params())
    opt.eval()
    saved = opt.state_dict()
    opt.train()
    opt.load_state_dict(saved)
    opt.train()
    for o in (opt, plain):
        train(o, range(6))
    assert all_same(copies(opt), copies(plain))


def test_every_wrapper_has_them() -> None:
    """Those without weights for evaluation hand both on, also to optimizers of others."""
    for opt in (
        danlu.GradientAccumulation(torch.optim.SGD(some_params(), lr=0.1), 2),
        danlu.Lazy(danlu.LayerAdaptation(danlu.Lion(some_params())), "params"),
    ):
        opt.eval()
        opt.train()

    class ScheduleFree(torch.optim.SGD):
        mode = "train"

        def eval(self) -> None:
            self.mode = "eval"

        def train(self) -> None:
            self.mode = "train"

    inner = ScheduleFree(some_params(), lr=0.1)
    opt = danlu.GradientAccumulation(danlu.Lookahead(inner), 2)
    opt.eval()
    assert inner.mode == "eval"
    opt.train()
    assert inner.mode == "train"


def test_weights_of_another_shape_are_refused() -> None:
    opt = danlu.EMA(danlu.Lion([("weight", p) for p in some_params(1)]))
    train(opt, range(2))
    opt.eval()
    before = copies(opt)
    saved = copy.deepcopy(opt.state_dict())
    saved["state"][0]["raw"] = torch.ones(9)
    with pytest.raises(ValueError, match=r"^weight: state 'raw' has shape"):
        opt.load_state_dict(saved)
    assert all_same(copies(opt), before)


@pytest.mark.parametrize("name", ["ema", "lookahead"])
def test_bf16_weights_keep_their_dtype(name: str) -> None:
    p = torch.nn.Parameter(torch.full((4,), 256.0, dtype=torch.bfloat16))
    opt = AVERAGING[name](torch.optim.SGD([p], lr=1.0))
    for _ in range(3):
        p.grad = torch.full_like(p, -2.0)
        opt.step()
    fast = p.detach().clone()
    opt.eval()
    saved = copy.deepcopy(opt.state_dict())
    loaded = AVERAGING[name](torch.optim.SGD([torch.nn.Parameter(p.detach().clone())], lr=1.0))
    loaded.load_state_dict(saved)
    key = the_one_that_averages(loaded).training_key
    assert loaded.state_dict()["state"][0][key].dtype == torch.bfloat16
    loaded.train()
    assert torch.equal(parameters(loaded)[0], fast)


@pytest.mark.parametrize("name", ["ema", "lookahead"])
def test_parameters_over_one_memory(name: str) -> None:
    """All copies are made before any weight is put in place."""
    base = torch.zeros(4)
    a, b = torch.nn.Parameter(base), torch.nn.Parameter(base[:2])
    opt = AVERAGING[name](torch.optim.SGD([a, b], lr=1.0))
    for _ in range(3):
        a.grad, b.grad = -torch.ones(4), -torch.ones(2)
        opt.step()
    before = a.detach().clone()
    opt.eval()
    assert not torch.equal(a, before)
    opt.train()
    assert torch.equal(a, before)
