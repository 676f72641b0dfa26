"""What is saved and loaded of a schedule of the optimizer's own, and what is of other libraries."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import state_dict as dcp

import danlu
from cases import values
from oracles.submodules import load
from relative_steps import OWN, every_own, jump, own, shown
from training import all_same, everything, parameters, some_params, train

transformers: Any = load(
    "transformers.optimization",
    [f"transformers.{name}" for name in ("trainer_pt_utils", "trainer_utils", "utils")],
)


def through_a_file(saved: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


def with_lr(value: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def change(saved: dict[str, Any]) -> dict[str, Any]:
        for group in saved["param_groups"]:
            group["lr"] = value
        return saved

    return change


def without_option(saved: dict[str, Any]) -> dict[str, Any]:
    """bert4keras as it was saved before it had the option."""
    for group in with_lr(None)(saved)["param_groups"]:
        if group["preset"] == "bert4keras":
            del group["relative_step"]
    return saved


@every_own
@pytest.mark.parametrize("change", [dict, with_lr(None), with_lr(0.0), without_option])
def test_saved_and_loaded(name: str, change: Callable[[Any], Any]) -> None:
    opt, rho = own(name), OWN[name][1]
    train(opt, range(2))
    jump(opt, 20_000)
    saved = change(through_a_file(opt.state_dict()))
    for options in (OWN[name][0], {"preset": opt.defaults["preset"], "lr": 0.5}):
        params = [torch.nn.Parameter(p.detach().clone()) for p in parameters(opt)]
        new = danlu.Adafactor(params, **options)
        new.load_state_dict(copy.deepcopy(saved))
        assert shown(new) == [rho(20_000)]
        train(new, [2])
        again = copy.deepcopy(opt)
        train(again, [2])
        assert all_same(everything(new), everything(again))
        assert shown(new) == [rho(20_001)]


@every_own
def test_copies(name: str) -> None:
    opt = own(name)
    train(opt, range(2))
    for other in (copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
        assert shown(other) == shown(opt)
        straight = copy.deepcopy(opt)
        train(other, [2])
        train(straight, [2])
        assert all_same(everything(other), everything(straight))
        other.add_param_group({"params": some_params(1)})
        assert shown(other)[1] == OWN[name][1](1)


def test_transformers_state_with_its_schedule() -> None:
    """It has written an lr into a group with relative_step."""
    theirs = transformers.Adafactor(some_params(2))
    schedule = transformers.AdafactorSchedule(theirs)
    for t in range(2):
        for i, p in enumerate(parameters(theirs)):
            p.grad = values(p.shape, 10 * t + i, wild=False)
        theirs.step()
        schedule.step()
    saved = copy.deepcopy(theirs.state_dict())
    assert saved["param_groups"][0]["lr"] is not None
    opt = danlu.Adafactor([torch.nn.Parameter(p.detach().clone()) for p in parameters(theirs)])
    opt.load_state_dict(saved)
    assert shown(opt) == [1e-2]
    train(opt, [2])


def test_a_torch_state_has_an_lr() -> None:
    theirs = torch.optim.Adafactor(some_params(2), lr=0.5, eps=(1e-30, 1e-3))
    opt = danlu.Adafactor(some_params(2))
    opt.load_state_dict(theirs.state_dict())
    assert (shown(opt), opt.param_groups[0]["relative_step"]) == ([0.5], False)


@pytest.mark.parametrize("flat", [False, True])
def test_a_distributed_checkpoint(flat: bool) -> None:
    """Which writes an lr of 0 and makes a step to see what state there is."""
    options = dcp.StateDictOptions(flatten_optimizer_state_dict=flat)
    model = torch.nn.Linear(3, 2)
    opt = danlu.Adafactor(model.parameters(), warmup_init=True)
    assert dcp.get_optimizer_state_dict(model, opt, options=options)
    train(opt, range(2))
    # a copy: tensors that fit are taken as they are
    saved = copy.deepcopy(dcp.get_optimizer_state_dict(model, opt, options=options))
    other = copy.deepcopy(model)
    new = danlu.Adafactor(other.parameters(), warmup_init=True)
    dcp.set_optimizer_state_dict(other, new, saved, options=options)
    assert shown(new) == shown(opt)
    assert all_same(parameters(new), parameters(opt))
    train(opt, [2])
    train(new, [2])
    assert all_same(everything(new), everything(opt))
