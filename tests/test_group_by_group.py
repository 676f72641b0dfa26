"""An optimizer whose param_groups are replaced for a step, as DeepSpeed's ZeRO 1 and 2 do."""

from __future__ import annotations

import gc
import weakref
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch

import danlu
from cases import ALL, Case
from danlu import optimizer as base
from danlu.plan import Plan
from training import all_same, everything, give_gradients, parameters, some_params

MADE = [case for case in ALL if case.id in ("lion", "adafactor", "layer-adamw")]
every_case = pytest.mark.parametrize("case", MADE, ids=lambda c: c.id)


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> list[Plan]:
    """Those that are made."""
    made: list[Plan] = []

    class Noted(Plan):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            made.append(self)

    monkeypatch.setattr(base, "Plan", Noted)
    return made


def in_groups(case: Case, backend: str) -> danlu.FusedOptimizer:
    return case.make([{"params": [p]} for p in some_params()], backend=backend)


def step_group_by_group(opt: danlu.FusedOptimizer) -> None:
    groups = opt.param_groups
    for group in groups:
        opt.param_groups = [group]
        opt.step()
        opt.param_groups = groups


@every_case
def test_groups_in_turn_are_planned_once(case: Case, backend: str, plans: list[Plan]) -> None:
    opt, want = in_groups(case, backend), in_groups(case, backend)
    for t in range(4):
        give_gradients(parameters(opt), t)
        step_group_by_group(opt)
    assert len(plans) == len(opt.param_groups)
    for t in range(4):
        give_gradients(parameters(want), t)
        want.step()
    assert all_same(everything(opt), everything(want))


def test_settings_are_those_of_the_group_that_steps(backend: str) -> None:
    opt, want = in_groups(MADE[0], backend), in_groups(MADE[0], backend)
    for t in range(4):
        for made in (opt, want):
            give_gradients(parameters(made), t)
            for i, group in enumerate(made.param_groups):
                group["lr"] = 0.1 * (i + t)
        step_group_by_group(opt)
        want.step()
    assert all_same(everything(opt), everything(want))


def test_all_groups_and_one_after_the_other(backend: str, plans: list[Plan]) -> None:
    opt, want = in_groups(MADE[0], backend), in_groups(MADE[0], backend)
    for t in range(6):
        for made in (opt, want):
            give_gradients(parameters(made), t)
        step_group_by_group(opt) if t % 2 else opt.step()
        want.step()
    assert all_same(everything(opt), everything(want))
    assert len(plans) == 1 + len(opt.param_groups) + 1  # and that of `want`


def drop_by_adding(opt: danlu.FusedOptimizer) -> None:
    opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})


def drop_by_loading(opt: danlu.FusedOptimizer) -> None:
    opt.load_state_dict(opt.state_dict())


def drop_by_steps(opt: danlu.FusedOptimizer) -> None:
    """Of the others: what has been removed for good is let go."""
    opt.param_groups = opt.param_groups[-1:]
    for _ in range(base.IDLE_STEPS + 1):
        opt.step()


@pytest.mark.parametrize("drop", [drop_by_adding, drop_by_loading, drop_by_steps])
def test_idle_plans_are_dropped(drop: Callable[[Any], None], backend: str) -> None:
    opt = in_groups(MADE[0], backend)
    give_gradients(parameters(opt), 0)
    step_group_by_group(opt)
    idle = [weakref.ref(plan) for plan in opt._idle_plans]
    assert len(idle) == len(opt.param_groups) - 1
    drop(opt)
    gc.collect()
    assert not any(plan() for plan in idle)
    opt.step()


def test_a_state_that_goes_or_is_replaced(backend: str) -> None:
    opt = in_groups(MADE[0], backend)
    give_gradients(parameters(opt), 0)
    for _ in range(2):
        step_group_by_group(opt)
    first, second = parameters(opt)[:2]
    opt.state[first]["exp_avg"] = torch.zeros_like(first)
    del opt.state[second]
    step_group_by_group(opt)
    assert opt.state[second]["step"] == 1
    assert opt.state[first]["step"] == 3


@pytest.mark.parametrize("kind", [dict, lambda held: defaultdict(dict, held)])
@pytest.mark.parametrize(
    "around",
    [lambda opt: opt, lambda opt: danlu.Lazy(opt), lambda opt: danlu.LayerAdaptation(opt)],
    ids=["plain", "Lazy", "LayerAdaptation"],
)
def test_param_groups_and_state_may_be_assigned(
    around: Callable[[Any], Any], kind: Callable[[Any], Any], backend: str
) -> None:
    made = [around(danlu.AdamW(some_params(), backend=backend)) for _ in range(2)]
    for t in range(4):
        for opt in made:
            give_gradients(parameters(opt), t)
        opt = made[0]
        opt.state = kind(opt.state if t != 1 else {})
        opt.param_groups = [dict(group) for group in opt.param_groups]
        if t == 1:
            made[1].state.clear()
        for opt in made:
            opt.step()
    assert all_same(everything(made[0]), everything(made[1]))
    inner = getattr(made[0], "optimizer", made[0])
    assert inner.state is made[0].state
    assert inner.param_groups is made[0].param_groups
