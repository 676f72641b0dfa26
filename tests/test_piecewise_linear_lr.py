"""A piecewise-linear learning rate is `LambdaLR` over `numpy.interp`, and a run goes on where it was."""

from __future__ import annotations

import copy
import io
import json
import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.optim.lr_scheduler import ChainedScheduler, ExponentialLR, LambdaLR, LRScheduler, SequentialLR

import danlu
from cases import ALL, Case, values
from training import all_same, everything, parameters, some_params, train

SCHEDULE = {2: 1.0, 5: 0.3, 7: 0.5}
Make = Callable[..., LRScheduler]


def piecewise(opt: torch.optim.Optimizer, last_epoch: int = -1) -> LRScheduler:
    return danlu.PiecewiseLinearLR(opt, SCHEDULE, last_epoch)


def interpolated(opt: torch.optim.Optimizer, last_epoch: int = -1) -> LRScheduler:
    """What it must equal."""
    return LambdaLR(opt, lambda t: float(np.interp(t, [0, *SCHEDULE], [0.0, *SCHEDULE.values()])), last_epoch)


def fresh(cls: Any = danlu.AdamW, **options: Any) -> torch.optim.Optimizer:
    one, *others = some_params(3)
    return cls([{"params": [one], "lr": 0.03}, {"params": others}], **{"lr": 0.1, **options})


def lrs(opt: torch.optim.Optimizer) -> list[float]:
    return [float(group["lr"]) for group in opt.param_groups]


def run(opt: torch.optim.Optimizer, schedule: LRScheduler, first: int, last: int) -> list[list[float]]:
    """The learning rates of some steps."""
    found = []
    for t in range(first, last):
        found.append(lrs(opt))
        train(opt, [t])
        schedule.step()
    return found


@pytest.mark.parametrize("zero", [True, False], ids=["from-its-own-point", "from-0"])
def test_factors_are_those_of_numpy(zero: bool) -> None:
    random = np.random.default_rng(0)
    opt = fresh()
    for _ in range(200):
        count = random.integers(1, 8)
        steps = random.choice(np.arange(1, random.choice([10, 1000, 10**7])), count, replace=False)
        factors = random.uniform(0, 10 ** random.uniform(-5, 5), count)
        points = dict(zip(steps.tolist(), factors.tolist(), strict=True))
        if zero:
            points[0] = float(random.uniform())
        expected = points if zero else {0: 0.0, **points}
        schedule = danlu.PiecewiseLinearLR(opt, points)
        at = np.concatenate([random.integers(0, 2 * steps.max(), 50), steps, steps - 1, steps + 1, [0]])
        ordered = sorted(expected.items())
        want = np.interp(at, [x for x, _ in ordered], [y for _, y in ordered])
        got = np.array([schedule.factor(t) for t in at.tolist()])
        assert got.tobytes() == want.tobytes()


@pytest.mark.parametrize("tensor", [False, True], ids=["float", "tensor"])
@pytest.mark.parametrize("case", ALL, ids=lambda c: c.id)
def test_every_optimizer_follows_it(case: Case, tensor: bool) -> None:
    opts = []
    for make in (piecewise, interpolated):
        params = some_params()
        lr = torch.tensor(case.hyper["lr"], dtype=torch.float64) if tensor else case.hyper["lr"]
        opt = case.make([{"params": params[:1]}, {"params": params[1:], "lr": 7e-3}], lr=lr)
        schedule = make(opt)
        before = copy.deepcopy(params)
        run(opt, schedule, 0, 1)
        assert all_same(before, params)  # the first factor is 0
        run(opt, schedule, 1, 9)
        assert not any(torch.equal(p, q) for p, q in zip(before, params, strict=True))
        opts.append(opt)
    assert all_same(*map(everything, opts))
    assert lrs(opts[0]) == lrs(opts[1]) == [case.hyper["lr"] * 0.5, 7e-3 * 0.5]


def through_torch(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return dict(torch.load(file, weights_only=True))


def through_json(state: dict[str, Any]) -> dict[str, Any]:
    return dict(json.loads(json.dumps(state)))


@pytest.mark.parametrize("saved", [through_torch, through_json])
@pytest.mark.parametrize("case", ALL, ids=lambda c: c.id)
def test_a_run_goes_on_where_it_was(case: Case, saved: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    whole = case.make(some_params())
    schedule = piecewise(whole)
    expected = run(whole, schedule, 0, 8)
    first = case.make(some_params())
    schedule = piecewise(first)
    found = run(first, schedule, 0, 4)
    again = case.make([p.detach().clone().requires_grad_() for p in parameters(first)])
    # the schedule is part of what is loaded
    loaded = danlu.PiecewiseLinearLR(again, {1: 9.0})
    again.load_state_dict(through_torch(first.state_dict()))
    loaded.load_state_dict(saved(schedule.state_dict()))
    assert loaded.state_dict() == schedule.state_dict()
    found += run(again, loaded, 4, 8)
    assert found == expected
    assert all_same(everything(again), everything(whole))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_go_on_too(copied: Callable[[LRScheduler], LRScheduler]) -> None:
    schedule = piecewise(fresh())
    run(schedule.optimizer, schedule, 0, 4)
    other = copied(schedule)
    assert other.optimizer is not schedule.optimizer
    results = [run(s.optimizer, s, 4, 8) for s in (schedule, other)]
    assert results[0] == results[1]


# ways to use a scheduler, and the learning rates that come out


def alone(opt: torch.optim.Optimizer, make: Make) -> list[list[float]]:
    return run(opt, make(opt), 0, 9)


def resumed(opt: torch.optim.Optimizer, make: Make) -> list[list[float]]:
    run(opt, make(opt), 0, 3)
    return run(opt, make(opt, last_epoch=3), 4, 9)


def jumping(opt: torch.optim.Optimizer, make: Make) -> list[list[float]]:
    schedule, found = make(opt), []
    for epoch in (4, 1, 20, 0, 2.5):
        train(opt, [0])
        with pytest.warns(UserWarning, match="epoch parameter"):
            schedule.step(epoch)  # type: ignore[arg-type]
        found.append(lrs(opt))
    return found


def in_sequence(opt: torch.optim.Optimizer, make: Make) -> list[list[float]]:
    parts: list[LRScheduler] = [make(opt), LambdaLR(opt, lambda t: 0.25 / (t + 1)), make(opt)]
    return run(opt, SequentialLR(opt, parts, milestones=[4, 6]), 0, 15)


def chained(opt: torch.optim.Optimizer, make: Make) -> list[list[float]]:
    return run(opt, ChainedScheduler([make(opt), ExponentialLR(opt, 0.5)]), 0, 9)


def with_a_late_group(opt: torch.optim.Optimizer, make: Make) -> list[list[float]]:
    schedule = make(opt)
    run(opt, schedule, 0, 3)
    opt.add_param_group({"params": [torch.nn.Parameter(values((5,), 9))], "lr": 0.7, "initial_lr": 0.7})
    train(opt, [3])
    with pytest.raises(ValueError, match="zip"):
        schedule.step()
    return run(opt, make(opt, last_epoch=3), 4, 9)


WAYS = [alone, resumed, jumping, in_sequence, chained, with_a_late_group]
OPTIMIZERS = [
    danlu.AdamW,
    danlu.Adafactor,
    torch.optim.AdamW,
    torch.optim.SGD,
    torch.optim.Adafactor,
    torch.optim.RMSprop,
]


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda c: f"{c.__module__.split('.')[0]}-{c.__name__}")
@pytest.mark.parametrize("way", WAYS, ids=lambda f: f.__name__)
def test_used_as_torchs_schedulers_are(way: Callable[..., Any], optimizer: Any) -> None:
    found, expected = (way(fresh(optimizer), make) for make in (piecewise, interpolated))
    assert found == expected
    assert len(set(map(tuple, found))) > 3


def test_torchs_closed_form() -> None:
    opt = fresh()
    schedule = danlu.PiecewiseLinearLR(opt, SCHEDULE)
    run(opt, schedule, 0, 4)
    assert schedule._get_closed_form_lr() == schedule.get_lr() == schedule.get_last_lr() == lrs(opt)


def test_a_tensor_stays_the_groups_own() -> None:
    lr = torch.tensor(0.1)
    opt = danlu.AdamW(some_params(), lr=lr)
    schedule = danlu.PiecewiseLinearLR(opt, {0: 1.0, 4: 0.0})
    for t in range(5):
        assert opt.param_groups[0]["lr"] is lr
        assert lr.item() == (torch.tensor(0.1) * (1 - t / 4)).item()
        train(opt, [t])
        schedule.step()


def test_numbers_of_numpy() -> None:
    schedule = danlu.PiecewiseLinearLR(fresh(), {np.int64(4): np.float32(0.5)})  # type: ignore[dict-item]
    assert through_torch(schedule.state_dict())["steps"] == [0, 4]
    assert through_json(schedule.state_dict())["factors"] == [0.0, 0.5]
    assert schedule.factor(2) == 0.25


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ({}, r"schedule must be a dict {step: factor} that is not empty, got {}"),
        ([(1, 2.0)], r"schedule must be a dict .* got \[\(1, 2.0\)\]"),
        ({10: 1.0, -1: 1.0}, "schedule must have integers of at least 0 as steps, got -1"),
        ({10.0: 1.0}, "as steps, got 10.0"),
        ({"10": 1.0}, "as steps, got '10'"),
        ({True: 1.0}, "as steps, got True"),
        ({10: -0.5}, r"schedule\[10\] must be finite and at least 0, got -0.5"),
        ({10: math.inf}, r"schedule\[10\] must be finite"),
        ({10: math.nan}, r"schedule\[10\] must be finite"),
        ({10: "1"}, r"schedule\[10\] must be a number, got '1'"),
        ({10: None}, r"schedule\[10\] must be a number, got None"),
    ],
)
def test_no_schedule(schedule: Any, message: str) -> None:
    opt = fresh()
    with pytest.raises(ValueError, match=message):
        danlu.PiecewiseLinearLR(opt, schedule)
    assert "initial_lr" not in opt.param_groups[0]


def test_no_learning_rate_to_multiply() -> None:
    relative = danlu.Adafactor(some_params())
    with pytest.raises(ValueError, match=r"lr of param_groups\[0\] follows from relative_step=True"):
        danlu.PiecewiseLinearLR(relative, SCHEDULE)
    assert "initial_lr" not in relative.param_groups[0]
    with pytest.raises(TypeError, match="not an Optimizer"):
        danlu.PiecewiseLinearLR(some_params(), SCHEDULE)  # type: ignore[arg-type]
