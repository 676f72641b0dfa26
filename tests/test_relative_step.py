"""A schedule of the optimizer's own: visible as an lr, deaf to what is written there, off with an lr."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler

import danlu
from cases import values
from danlu.testing import same_bits
from oracles.submodules import load
from relative_steps import OWN, every_own, jump, own, shown
from training import all_same, everything, parameters, some_params, train

transformers: Any = load(
    "transformers.optimization",
    [f"transformers.{name}" for name in ("trainer_pt_utils", "trainer_utils", "utils")],
)


WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "alone": lambda opt: opt,
    "lookahead": lambda opt: danlu.Lookahead(opt, k=2),
    "ema": lambda opt: danlu.EMA(opt, decay=0.9),
    "accumulation": lambda opt: danlu.GradientAccumulation(opt, 1),
    "three": lambda opt: danlu.GradientAccumulation(danlu.EMA(danlu.Lookahead(opt)), 1),
}
every_wrapper = pytest.mark.parametrize("around", WRAPPERS)


@every_own
def test_the_lr_is_visible(name: str, backend: str) -> None:
    opt, rho = own(name, backend=backend), OWN[name][1]
    assert shown(opt) == [rho(1)]
    for t in range(1, 4):
        train(opt, [t])
        assert shown(opt) == [rho(t)]
    jump(opt, 20_000)
    train(opt, [4])
    assert shown(opt) == [rho(20_001)]


def write(value: Any) -> Callable[[danlu.Adafactor], Any]:
    def act(opt: danlu.Adafactor) -> None:
        for group in opt.param_groups:
            group["lr"] = value

    return act


WRITERS: dict[str, Callable[[danlu.Adafactor], Any]] = {
    "0": write(0.0),
    "a tensor of 0": lambda opt: write(torch.tensor(0.0))(opt),
    "None": write(None),
    "NaN": write(math.nan),
    "no number": write("x"),
    "transformers' schedule": lambda opt: transformers.AdafactorSchedule(opt),
    "RelativeStepLR": lambda opt: danlu.RelativeStepLR(opt),
    "plateau": lambda opt: lr_scheduler.ReduceLROnPlateau(opt).step(1.0),
}


@pytest.mark.pairs
@every_own
@pytest.mark.parametrize("writer", WRITERS)
def test_what_is_written_there_is_ignored(name: str, writer: str, backend: str) -> None:
    opt, undisturbed = own(name, backend=backend), own(name, backend=backend)
    for t in range(3):
        WRITERS[writer](opt)
        train(opt, [t])
        train(undisturbed, [t])
        assert all_same(everything(opt), everything(undisturbed))
        assert shown(opt) == shown(undisturbed)
    assert not same_bits(parameters(opt)[0], some_params(3)[0])


FACTORS: dict[str, Callable[[Any], Any]] = {
    "lambda": lambda opt: lr_scheduler.LambdaLR(opt, lambda t: 1 / (t + 2)),
    "cosine": lambda opt: lr_scheduler.CosineAnnealingLR(opt, 10),
    "warm-up": lambda opt: lr_scheduler.LinearLR(opt, 0.1),
    "one cycle": lambda opt: lr_scheduler.OneCycleLR(opt, 0.1, total_steps=9, cycle_momentum=False),
    "cyclic": lambda opt: lr_scheduler.CyclicLR(opt, 0.1, 0.2, cycle_momentum=False),
    "chained": lambda opt: lr_scheduler.ChainedScheduler([lr_scheduler.StepLR(opt, 1)], opt),
    "sequential": lambda opt: lr_scheduler.SequentialLR(
        opt, [lr_scheduler.StepLR(opt, 1), lr_scheduler.ExponentialLR(opt, 0.5)], [2]
    ),
}


@pytest.mark.parametrize("around", ["alone", "three"])
@pytest.mark.parametrize("make", FACTORS)
def test_a_scheduler_that_is_ignored_is_said_once(make: str, around: str) -> None:
    opt, undisturbed = WRAPPERS[around](own("huggingface")), WRAPPERS[around](own("huggingface"))
    scheduler = FACTORS[make](opt)
    for t in range(3):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            train(opt, [t])
        texts = [str(w.message) for w in caught]
        assert len(texts) == (t == 0), texts
        assert all("param_groups[0]" in text and "relative_step=True" in text for text in texts)
        train(undisturbed, [t])
        assert all_same(everything(opt), everything(undisturbed))
        assert shown(opt) == [1e-2]
        scheduler.step()


@every_own
@every_wrapper
def test_relative_step_lr_has_the_lr_of_the_next_step(name: str, around: str) -> None:
    inner, rho = own(name), OWN[name][1]
    opt = WRAPPERS[around](inner)
    schedule = danlu.RelativeStepLR(opt)
    assert isinstance(schedule, lr_scheduler.LRScheduler)
    t = 1
    for jump_to in (None, None, 40_000, None):
        assert schedule.get_last_lr() == shown(opt) == [rho(t)]
        train(opt, [t])
        assert shown(opt) == [rho(t)]
        if jump_to is not None:
            jump(inner, jump_to)
            t = jump_to
        schedule.step()
        t += 1
    assert "initial_lr" not in opt.param_groups[0]


def test_relative_step_lr_beside_an_lr() -> None:
    one, two, three = some_params(3)
    lr = torch.tensor(0.5)
    opt = danlu.Adafactor([{"params": [one], "lr": 0.25}, {"params": [two], "lr": lr}, {"params": [three]}])
    factor = lr_scheduler.ConstantLR(opt, 0.5, 100)  # may be there before, for the other groups
    schedule = danlu.RelativeStepLR(opt)
    with pytest.warns(UserWarning, match=r"param_groups\[2\].*relative_step=True"):
        train(opt, [0])
    factor.step()
    schedule.step()
    assert schedule.get_last_lr() == [0.125, 0.25, 1e-2]
    assert opt.param_groups[1]["lr"] is lr
    assert [group["initial_lr"] for group in opt.param_groups] == [0.25, 0.5, 1e-2]


def test_relative_step_lr_resumes() -> None:
    opt = own("warmup_init")
    schedule = danlu.RelativeStepLR(opt)
    for t in range(3):
        train(opt, [t])
        schedule.step()
    again = own("warmup_init")
    resumed = danlu.RelativeStepLR(again)
    again.load_state_dict(opt.state_dict())
    resumed.load_state_dict(pickle.loads(pickle.dumps(schedule.state_dict())))
    assert resumed.get_last_lr() == schedule.get_last_lr() == [4e-6]
    late = danlu.RelativeStepLR(copy.deepcopy(again), last_epoch=2)
    assert (late.last_epoch, late.get_last_lr()) == (3, [4e-6])


def test_what_relative_step_lr_refuses() -> None:
    with pytest.raises(TypeError, match=r"optimizer must be a danlu\.Adafactor, got Lookahead"):
        danlu.RelativeStepLR(danlu.Lookahead(danlu.Lion(some_params())))
    with pytest.raises(TypeError, match=r"optimizer must be a danlu\.Adafactor, got int"):
        danlu.RelativeStepLR(3)  # type: ignore[arg-type]
    opt = danlu.Adafactor(some_params(), lr=0.1)
    with pytest.raises(ValueError, match="relative_step must be True in a group"):
        danlu.RelativeStepLR(opt)
    assert "initial_lr" not in opt.param_groups[0]


@every_own
@pytest.mark.parametrize("started", [False, True], ids=["new", "after a step"])
def test_piecewise_linear_lr_refuses(name: str, started: bool) -> None:
    opt = own(name)
    if started:
        train(opt, [0])
    with pytest.raises(ValueError, match=r"lr of param_groups\[0\] follows from relative_step=True"):
        danlu.PiecewiseLinearLR(opt, {1: 1.0})


@pytest.mark.parametrize("options", [{}, dict(warmup_init=True), dict(scale_parameter=False)], ids=str)
def test_transformers_schedule_reports_what_it_does_there(options: dict[str, Any]) -> None:
    ours, theirs = (
        make([torch.nn.Parameter(p.detach().double()) for p in some_params(3)], **options)
        for make in (danlu.Adafactor, transformers.Adafactor)
    )
    schedules = [transformers.AdafactorSchedule(opt) for opt in (ours, theirs)]
    assert schedules[0].get_last_lr() == schedules[1].get_last_lr() == [0.0]
    for t in range(4):
        before = parameters(ours)[0].detach().norm().item()
        for opt in (ours, theirs):
            for i, q in enumerate(parameters(opt)):
                q.grad = values(q.shape, 10 * t + i, wild=False).double()
            opt.step()
        for schedule in schedules:
            schedule.step()
        (found,), (expected,) = (schedule.get_last_lr() for schedule in schedules)
        assert type(found) is float
        if options.get("scale_parameter", True):
            # theirs is scaled by the size before the step, ours by that after it
            found *= before / parameters(ours)[0].detach().norm().item()
        assert found == pytest.approx(float(expected), rel=1e-12)


def test_the_lr_of_transformers_schedule_without_relative_step() -> None:
    p = torch.nn.Parameter(torch.full((3,), 2.0))
    for preset, alpha in (
        ("huggingface", 0.5),
        ("torch", 0.5),
        ("optax", 0.5),
        ("big_vision", 0.25),
        ("bert4keras", 0.5),
    ):
        opt = danlu.Adafactor([p], preset=preset, lr=torch.tensor(0.25))
        assert opt._get_lr(opt.param_groups[0], {}) == alpha


# An lr in a group.


@pytest.mark.parametrize("late", [False, True], ids=["at once", "added"])
def test_an_lr_in_a_group_turns_relative_step_off_there(late: bool, backend: str) -> None:
    hyper = dict(weight_decay=0.1, warmup_init=True)
    one, two = some_params(2)
    groups = [{"params": [one]}, {"params": [two], "lr": 1e-3}]
    if late:
        opt = danlu.Adafactor([groups[0]], backend=backend, **hyper)  # type: ignore[arg-type]
        opt.add_param_group(groups[1])
    else:
        opt = danlu.Adafactor(groups, backend=backend, **hyper)  # type: ignore[arg-type]
    assert [(g["lr"], g["relative_step"], g["warmup_init"]) for g in opt.param_groups] == [
        (1e-6, True, True),
        (1e-3, False, False),
    ]
    apart = [
        danlu.Adafactor([torch.nn.Parameter(one.detach().clone())], backend=backend, **hyper),  # type: ignore[arg-type]
        danlu.Adafactor(
            [torch.nn.Parameter(two.detach().clone())], lr=1e-3, weight_decay=0.1, backend=backend
        ),
    ]
    for t in range(3):
        for i, other in enumerate((one, two)):
            other.grad = values(other.shape, 10 * t + i, wild=False)
            (q,) = parameters(apart[i])
            q.grad = other.grad.clone()
            apart[i].step()
        opt.step()
        assert all_same([one, two], [p for other in apart for p in parameters(other)])
    assert [g["lr"] for g in opt.param_groups] == [3e-6, 1e-3]


def test_groups_of_a_model_with_an_lr() -> None:
    groups = danlu.param_groups(
        torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4)), 0.1, lr=1e-3
    )
    opt = danlu.Adafactor(groups)
    assert len(opt.param_groups) == 2
    assert all(g["lr"] == 1e-3 and not g["relative_step"] for g in opt.param_groups)


# constructor, group: lr and relative_step of the group
SAID: list[tuple[dict[str, Any], dict[str, Any], tuple[float, bool]]] = [
    ({}, {}, (1e-2, True)),
    ({}, {"lr": None}, (1e-2, True)),
    ({}, {"relative_step": False, "lr": 0.5}, (0.5, False)),
    ({"relative_step": True}, {"lr": 0.5}, (0.5, False)),
    ({"lr": 0.1}, {}, (0.1, False)),
    ({"lr": 0.1}, {"lr": None}, (1e-2, True)),
    ({"lr": 0.1}, {"relative_step": True}, (1e-2, True)),
    ({"lr": 0.1}, {"relative_step": True, "lr": None, "warmup_init": True}, (1e-6, True)),
    ({"preset": "bert4keras"}, {}, (1e-3, False)),
    ({"preset": "bert4keras"}, {"lr": None}, (1e-2, True)),
    ({"preset": "bert4keras", "lr": None}, {"lr": 0.5}, (0.5, False)),
    ({"preset": "bert4keras", "relative_step": True}, {}, (1e-2, True)),
]


@pytest.mark.parametrize(("constructor", "group", "found"), SAID, ids=str)
def test_what_a_group_says(
    constructor: dict[str, Any], group: dict[str, Any], found: tuple[float, bool]
) -> None:
    mine = {"params": some_params(1), **group}
    kept = dict(mine)
    opt = danlu.Adafactor([mine], **constructor)
    assert (opt.param_groups[0]["lr"], opt.param_groups[0]["relative_step"]) == found
    assert mine == kept  # so that another optimizer may be made from it
    train(danlu.Adafactor([mine], **constructor), [0])
    train(danlu.Adafactor([mine], **constructor), [0])


@pytest.mark.parametrize(
    ("constructor", "group", "message"),
    [
        ({}, {"lr": 1e-3, "relative_step": True}, "lr must be None with relative_step=True"),
        ({"lr": 0.1}, {"lr": 1e-3, "relative_step": True}, "lr must be None with relative_step=True"),
        ({}, {"lr": 1e-3, "warmup_init": True}, "warmup_init=True needs relative_step=True"),
        ({}, {"relative_step": False}, "lr must be given in the preset 'huggingface' without relative_step"),
        ({"preset": "torch"}, {"relative_step": True}, "relative_step is no option of the preset 'torch'"),
        (
            {"preset": "big_vision", "lr": 1.0},
            {"lr": None},
            "lr must be given in the preset 'big_vision', got None",
        ),
    ],
)
def test_a_group_that_contradicts_itself(
    constructor: dict[str, Any], group: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        danlu.Adafactor([{"params": some_params(1), **group}], **constructor)
    opt = danlu.Adafactor(some_params(1), **constructor)
    with pytest.raises(ValueError, match=message):
        opt.add_param_group({"params": some_params(1), **group})
    assert len(opt.param_groups) == 1


def test_optax_without_an_lr_has_lr_1() -> None:
    p, q = some_params(2)
    for opt in (
        danlu.Adafactor([p], preset="optax"),
        danlu.Adafactor([p], preset="optax", lr=None),
        danlu.Adafactor([{"params": [p], "lr": None}], preset="optax", lr=0.5),
    ):
        assert shown(opt) == [1.0]
    lr_scheduler.ConstantLR(opt, 0.5)
    assert shown(opt) == [0.5]
    old = opt.state_dict()
    old["param_groups"][0]["lr"] = None
    fresh = danlu.Adafactor([q], preset="optax", lr=0.5)
    fresh.load_state_dict(old)
    assert shown(fresh) == [1.0]


def test_a_live_group_without_an_lr_is_named() -> None:
    opt = danlu.Adafactor(some_params(1), lr=0.1)
    train(opt, [0])
    kept = everything(opt)
    opt.param_groups[0]["lr"] = None
    with pytest.raises(
        ValueError, match="lr must be given in the preset 'huggingface' without relative_step"
    ):
        train(opt, [1])
    assert all_same(kept, everything(opt))
    opt.param_groups[0]["relative_step"] = True
    train(opt, [1])
    assert shown(opt) == [1e-2]


def test_the_first_parameter_that_has_made_a_step_says_the_step() -> None:
    opt = own("warmup_init")
    late, *others = parameters(opt)
    for _ in range(3):
        for p in others:
            p.grad = torch.ones_like(p)
        opt.step()
    assert shown(opt) == [3e-6]
    late.grad = torch.ones_like(late)
    opt.step()
    assert shown(opt) == [1e-6]


def test_where_counters_are_on_a_device_the_lr_is_a_tensor_there(monkeypatch: pytest.MonkeyPatch) -> None:
    opt = own("warmup_init")
    train(opt, range(2))
    monkeypatch.setattr("danlu.scale.is_on_device", lambda value: isinstance(value, torch.Tensor))
    opt._show_lr()
    lr = opt.param_groups[0]["lr"]
    assert (lr.dtype, lr.item()) == (torch.float64, 2e-6)
    jump(opt, 4)
    opt._show_lr()
    assert opt.param_groups[0]["lr"] is lr  # which a captured step has written
    assert lr.item() == 4e-6
    schedule = danlu.RelativeStepLR(opt)
    assert opt.param_groups[0]["lr"] is lr
    assert schedule.get_last_lr() == [1e-6 * torch.tensor(5.0, dtype=torch.float64)]


def test_groups_of_one_optimizer_make_another() -> None:
    """The lr that they show is not theirs."""
    p = torch.nn.Parameter(torch.ones(3, 4))
    first = danlu.Adafactor([p])
    p.grad = torch.ones_like(p)
    first.step()
    second = danlu.Adafactor([dict(group) for group in first.param_groups])
    assert second.param_groups[0]["relative_step"]
    second.add_param_group({**first.param_groups[0], "params": [torch.nn.Parameter(torch.ones(2))]})
    assert [group["relative_step"] for group in second.param_groups] == [True, True]
    with pytest.raises(ValueError, match="lr must be None with relative_step=True"):
        second.add_param_group(
            {"params": [torch.nn.Parameter(torch.ones(2))], "lr": 1.0, "relative_step": True}
        )
