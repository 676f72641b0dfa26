"""Frameworks that give an optimizer some of its groups, other parameters, or another state."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from taken_apart import AROUND, INSIDE, all_of, wrappings_around
from training import all_same, give_gradients, parameters, some_params, train
from wrapped import Wrapping

pytestmark = pytest.mark.usefixtures("one_thread")

Made = tuple[Callable[[Any], torch.optim.Optimizer], Wrapping]


@pytest.fixture(params=wrappings_around(INSIDE, 4), ids=lambda x: f"{x[1].id}-{x[0]}")
def made(request: pytest.FixtureRequest) -> Made:
    """What makes an optimizer, and its wrappers."""
    name, wrapping = request.param
    return INSIDE[name], wrapping


def two_groups() -> list[dict[str, Any]]:
    params = some_params()
    return [{"params": params[:2]}, {"params": params[2:], "lr": 3e-3}]


def group_by_group(opt: Any, act: Callable[[], object]) -> None:
    """As DeepSpeed's ZeRO 1 and 2 do."""
    groups = opt.param_groups
    for group in groups:
        opt.param_groups = [group]
        act()
    opt.param_groups = groups


def test_one_group_after_the_other(made: Made) -> None:
    """Cycles count steps, not groups."""
    make, wrapping = made
    a, b = wrapping.make(make(two_groups())), wrapping.make(make(two_groups()))
    for t in range(2 * wrapping.period + 1):
        give_gradients(parameters(a), t)
        train(b, [t])
        group_by_group(a, a.step)
        assert (a.stepped, a.position) == (b.stepped, b.position)
        assert all_same(all_of(a), all_of(b)), t
    if hasattr(a, "flush"):
        group_by_group(a, a.flush)
        b.flush()
        assert all_same(all_of(a), all_of(b))
    for opt in (a, b):
        opt.eval()
    assert all_same(all_of(a), all_of(b))
    loaded = wrapping.make(make(two_groups()))
    with torch.no_grad():
        for p, q in zip(parameters(loaded), parameters(a), strict=True):
            p.copy_(q)
    loaded.load_state_dict(copy.deepcopy(a.state_dict()))
    for opt in (a, b, loaded):
        opt.train()
        train(opt, range(50, 53))
    assert all_same(all_of(a), all_of(b))
    assert all_same(all_of(loaded), all_of(b))


def test_another_state_is_given(made: Made) -> None:
    """As plain dicts, of a view of it, through `__setstate__`, or value by value."""
    make, wrapping = made
    opt = wrapping.make(make(some_params()))
    for t in range(wrapping.period):
        train(opt, [t])
        whole, viewed, loaded, changed = others = [copy.deepcopy(opt) for _ in range(4)]
        states, groups = [], []
        for other in others:
            of = dict(zip(parameters(opt), parameters(other), strict=True))
            states.append({of[p]: copy.deepcopy(dict(held)) for p, held in opt.state.items()})
            groups.append(
                [{**group, "params": [of[p] for p in group["params"]]} for group in opt.param_groups]
            )
            train(other, [90])
            with torch.no_grad():
                for p, q in of.items():
                    q.copy_(p)
        whole.state, whole.param_groups = states[0], groups[0]
        viewed.state, viewed.param_groups = states[1], groups[1]
        viewed.state = viewed.state
        loaded.__setstate__({"state": states[2], "param_groups": groups[2]})
        changed.param_groups = groups[3]
        for p, held in states[3].items():
            entry = changed.state[p]
            for name in [*entry]:
                del entry[name]
            entry.update(held)
        on = copy.deepcopy(opt)
        for other in (on, *others):
            train(other, range(20, 21 + wrapping.period))
        for i, other in enumerate(others):
            assert all_same(all_of(other), all_of(on)), (t, i)


def test_state_that_is_not_there(made: Made) -> None:
    """Is asked for as in torch's dict: an entry is made by [] alone."""
    make, wrapping = made
    opt = wrapping.make(make(some_params()))
    p = parameters(opt)[0]
    missing = object()
    assert p not in opt.state
    assert opt.state.get(p) is None
    assert opt.state.get(p, missing) is missing
    assert opt.state.pop(p, missing) is missing
    with pytest.raises(KeyError):
        opt.state.pop(p)
    with pytest.raises(KeyError):
        del opt.state[p]
    assert len(opt.state) == 0
    assert dict(opt.state.setdefault(p, {"note": missing})) == {"note": missing}
    assert dict(opt.state.pop(p)) == {"note": missing}
    assert dict(opt.state[p]) == {}
    assert list(opt.state) == [p]


WAYS = ["a new dict", "in place", "popped"]


def replace(opt: Any, change: Callable[[torch.Tensor], torch.Tensor], how: str) -> None:
    """As Gaussian splatting densifies and prunes: the parameter goes, its state stays."""
    for group in opt.param_groups:
        old = group["params"][0]
        new = torch.nn.Parameter(change(old.detach()))
        held = opt.state.get(old, None)
        if held is not None:
            if how == "a new dict":
                held = {name: change(x) if x is not None and x.dim() else x for name, x in held.items()}
                del opt.state[old]
            elif how == "in place":
                for name in held:
                    if held[name].dim():
                        held[name] = change(held[name])
                del opt.state[old]
            else:
                held = opt.state.pop(old)
                for name in held.keys():  # noqa: SIM118
                    if held[name].dim():
                        held[name] = change(held[name])
        group["params"][0] = new
        if held is not None:
            opt.state[new] = held


@pytest.mark.parametrize(
    ("name", "wrapping"),
    wrappings_around(["adamw", "tiger", "lazy", "torch-sgd", "torch-adam", "torch-rmsprop"], 3),
    ids=lambda x: getattr(x, "id", x),
)
def test_parameters_are_replaced(name: str, wrapping: Wrapping) -> None:
    """Rows that stay go on as if nothing had happened, after any number of steps."""
    rows = torch.tensor([3, 0, 2])
    for at, how in itertools.product(range(wrapping.period + 1), WAYS):
        whole = wrapping.make(INSIDE[name]([{"params": [p]} for p in some_params()]))
        opt = wrapping.make(INSIDE[name]([{"params": [p]} for p in some_params()]))
        for t in range(at + wrapping.period + 1):
            if t == at:
                replace(opt, lambda x: x[rows].clone(), how)
                assert len(opt.state) == len(whole.state)
            give_gradients(parameters(whole), t)
            for p, q in zip(parameters(opt), parameters(whole), strict=True):
                p.grad = (q.grad if t < at else q.grad[rows]).clone()
            whole.step()
            opt.step()
        want = [x[rows] if x.dim() else x for x in all_of(whole)]
        assert all_same(all_of(opt), want), at


@pytest.mark.parametrize("replaced", [True, False])
@pytest.mark.parametrize("name", ["adamw", "torch-adamw"])
@pytest.mark.parametrize("wrapping", AROUND, ids=lambda w: w.id)
def test_a_parameter_cut_without_the_wrappers_states(name: str, wrapping: Wrapping, replaced: bool) -> None:
    """As by a tool that knows Adam's alone: the step that cannot go on says so, before anything moves."""
    opt = wrapping.make(INSIDE[name]([("weight", p) for p in some_params()]))
    train(opt, range(2 * wrapping.period + 1))
    params = opt.param_groups[0]["params"]
    held = opt.state[params[1]]
    for key in ("exp_avg", "exp_avg_sq"):
        held[key] = held[key][:3]
    if replaced:
        del opt.state[params[1]]
        params[1] = torch.nn.Parameter(params[1].detach()[:3].clone())
        opt.state[params[1]] = held
    else:
        params[1].data = params[1].data[:3].clone()
        opt.state[params[1]] = dict(held)
    give_gradients(parameters(opt), 50)
    before = all_of(opt)
    with pytest.raises(ValueError, match=r"^weight: state '(ema|slow|mean_grad)'"):
        opt.step()
    assert all_same(all_of(opt), before)
    entry = opt.state[params[1]]
    for key in {"ema", "slow", "mean_grad"} & entry.keys():
        entry[key] = entry[key][:3]
    train(opt, range(60, 60 + 2 * wrapping.period))
