"""Distributed checkpoints ask a new optimizer for its state: it makes that, and nothing counts as a step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import state_dict as dcp

import danlu
from cases import ALL
from danlu import callers
from training import all_same, copies, everything, give_gradients, parameters, some_params, train
from wrapped import LAZY

MAKERS = {case.id: case.make for case in ALL} | LAZY
every_maker = pytest.mark.parametrize("name", MAKERS)


def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2, bias=False))


@every_maker
def test_nothing_counts_as_a_step(name: str, backend: str) -> None:
    asked, other = model(), model()
    opt, never_asked = (MAKERS[name](m.parameters(), backend=backend) for m in (asked, other))
    start = copies(opt)
    saved = dcp.get_optimizer_state_dict(asked, opt)
    assert set(saved["state"]) == {name for name, _ in asked.named_parameters()}
    assert {held[name].item() for held in opt.state.values() for name in held if "step" in name} == {0}
    assert all_same([p.detach() for p in parameters(opt)], start)
    for o in (opt, never_asked):
        train(o, range(4))  # an accumulation begins where it would have
    assert all_same(everything(opt), everything(never_asked))


@every_maker
def test_the_state_is_that_of_a_step(name: str) -> None:
    asked, other = model(), model()
    opt, stepped = (MAKERS[name](m.parameters()) for m in (asked, other))
    dcp.get_optimizer_state_dict(asked, opt)
    train(stepped, range(1))
    for held, expected in zip(opt.state.values(), stepped.state.values(), strict=True):
        found, wanted = ({k: (v.shape, v.dtype) for k, v in s.items()} for s in (held, expected))
        assert found == wanted


def test_a_schedule_of_its_own_moves_nothing() -> None:
    """Without an lr there is none to set to 0."""
    asked = model()
    opt = danlu.Adafactor(asked.parameters(), relative_step=True, weight_decay=0.5)
    start = copies(opt)
    dcp.get_optimizer_state_dict(asked, opt)
    assert all_same([p.detach() for p in parameters(opt)], start)


def test_counters_of_a_device_are_made_too() -> None:
    asked = model()
    opt = danlu.AdamW(asked.parameters(), capturable=True)
    dcp.get_optimizer_state_dict(asked, opt)
    assert {held["step"].item() for held in opt.state.values()} == {0}


def test_parameters_are_validated_before_any_state_is_made() -> None:
    asked = model()
    asked[1].weight = torch.nn.Parameter(torch.ones(2, 1).expand(2, 4))
    opt = danlu.AdamW(asked.named_parameters())
    with pytest.raises(ValueError, match=r"1\.weight: elements of the parameter share memory"):
        dcp.get_optimizer_state_dict(asked, opt)
    assert not opt.state


def test_what_is_frozen_gets_no_state() -> None:
    asked = model()
    asked[0].weight.requires_grad_(False)
    opt = danlu.AdamW(asked.parameters())
    dcp.get_optimizer_state_dict(asked, opt)
    assert set(opt.state) == {asked[0].bias, asked[1].weight}


def test_a_step_of_the_user_counts_even_if_it_looks_alike(backend: str) -> None:
    """lr 0 and zeros as gradients."""
    asked = model()
    opt = danlu.Tiger(asked.parameters(), lr=0.0, accumulation_steps=3, backend=backend)
    for p in asked.parameters():
        p.grad = torch.zeros_like(p)
    opt.step(closure=None)
    assert {held["micro_step"].item() for held in opt.state.values()} == {1}


def test_the_request_is_seen_however_deep_and_only_inside() -> None:
    """torch's own function, should it ever have another name, fails here."""
    seen: list[bool] = []

    class Asked(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            def deeper() -> bool:
                return callers.asks_for_state()

            seen.append(deeper())

    dcp._init_optim_state(Asked(model().parameters(), lr=0.1))
    assert seen == [True]
    assert not callers.asks_for_state()
    Asked(model().parameters(), lr=0.1).step(closure=None)
    assert seen == [True, False]

    def _init_optim_state(opt: Asked) -> None:  # of a user, with a step of its own
        opt.step()

    _init_optim_state(Asked(model().parameters(), lr=0.1))
    assert seen == [True, False, False]


def test_later_steps_do_not_look_who_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    opt = danlu.AdamW(model().parameters())
    train(opt, range(1))
    monkeypatch.setattr(callers, "asks_for_state", lambda: pytest.fail("a walk over the stack"))
    train(opt, range(1, 2))


@pytest.mark.parametrize("written", [False, True])
def test_state_that_was_asked_for_and_then_written_stays(written: bool) -> None:
    """As a checkpoint does that is read into the tensors; else a first step is a first step."""
    model = torch.nn.ParameterList(some_params())
    opt = danlu.EMA(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, dampening=0.5))
    dcp.get_optimizer_state_dict(model, opt)
    if written:
        for p in model:
            opt.state[p]["momentum_buffer"].zero_()
    before = parameters(opt)[0].detach().clone()
    train(opt, range(1))
    moved = (before - parameters(opt)[0].detach()) / parameters(opt)[0].grad
    torch.testing.assert_close(moved, torch.full_like(moved, 0.05 if written else 0.1), rtol=1e-4, atol=0.0)


def test_being_asked_for_state_is_no_step_of_the_optimizer_inside() -> None:
    """Whatever it counts where, whatever comes of 0 / 0, and whoever listens."""

    class Counting(torch.optim.AdamW):
        def step(self, closure: Any = None) -> Any:
            for group in self.param_groups:
                group["step"] = group.get("step", 0) + 1
                for p in group["params"]:
                    p.data.add_(1.0)
            return super().step(closure)

    model = torch.nn.ParameterList(some_params())
    inner = Counting(model.parameters(), eps=0.0)
    opt = danlu.EMA(inner)
    inner.register_step_post_hook(lambda *_: pytest.fail("a step"))
    groups, before = [dict(group) for group in inner.param_groups], copies(opt)
    for gradients in (False, True):
        if gradients:
            give_gradients(model, 0)
            inner.state.clear()
        kept = [p.grad for p in model]
        dcp.get_optimizer_state_dict(model, opt)
        assert [dict(group) for group in inner.param_groups] == groups
        assert all_same(list(model), before[:3])
        assert all(p.grad is g for p, g in zip(model, kept, strict=True))
        assert set(inner.state) == set(model)
