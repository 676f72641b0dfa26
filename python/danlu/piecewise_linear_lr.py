"""A learning rate that is linear between given points."""

from __future__ import annotations

import numbers
from bisect import bisect_right
from collections.abc import Mapping
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler

from . import checks


class PiecewiseLinearLR(LRScheduler):
    """Multiplies every group's initial lr by a factor that is linear between given steps, and constant after.

        lr = initial_lr * interpolated(t)       t = last_epoch: the steps made before, 0 for the first

    `{1000: 1.0, 10000: 0.1}` leads from factor 0 at t = 0 to 1 at t = 1000 and to 0.1 at t = 10000. The first
    step has factor 0 unless the schedule has another for t = 0. The factor has the bits of `numpy.interp`.
    (After Jianlin Su's bert4keras.)

    Each lr is set from its initial one, as `torch.optim.lr_scheduler.LambdaLR` does: in a `ChainedScheduler`
    this is to be the first. An lr that is a tensor is filled in place.

    Args:
        optimizer: any optimizer of torch or danlu whose groups have an lr.
        schedule: `{step: factor}` in any order; steps are integers, the unit is calls of `step`.
        last_epoch: the last t, when a run is resumed without a state_dict of the scheduler; -1 begins anew.

    A state_dict holds the schedule, as lists of numbers that JSON keeps as well, and loading one replaces it.

    Raises:
        ValueError: the schedule is empty, a step or a factor is out of its range, or a group's lr is None or
            follows from relative_step.

    >>> optimizer = danlu.AdamW([torch.nn.Parameter(torch.ones(3))], lr=1e-3)
    >>> schedule = danlu.PiecewiseLinearLR(optimizer, {1000: 1.0, 10_000: 0.1})
    >>> [schedule.factor(t) for t in (0, 250, 1000, 5500, 20_000)]
    [0.0, 0.25, 1.0, 0.55, 0.1]
    >>> optimizer.step()
    >>> schedule.step()  # after each of the optimizer's steps
    >>> optimizer.param_groups[0]["lr"]
    1e-06
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, schedule: Mapping[int, float], last_epoch: int = -1
    ) -> None:
        points = _points(schedule)
        # not a dict: JSON would turn its keys into strings
        self.steps = list(points)
        self.factors = list(points.values())
        for i, group in enumerate(getattr(optimizer, "param_groups", ())):
            if group["lr"] is None or group.get("relative_step"):
                found = "is None" if group["lr"] is None else "follows from relative_step=True"
                raise ValueError(
                    f"lr of param_groups[{i}] {found}, a schedule of the optimizer's own; "
                    "there must be an lr that factors can multiply"
                )
        super().__init__(optimizer, last_epoch)

    def factor(self, t: float) -> float:
        """What the initial lr is multiplied by once `t` steps were made."""
        after = bisect_right(self.steps, t)
        if after == 0:
            return self.factors[0]
        if after == len(self.steps):
            return self.factors[-1]
        step, factor = self.steps[after - 1], self.factors[after - 1]
        # numpy's order of operations
        slope = (self.factors[after] - factor) / (self.steps[after] - step)
        return slope * (t - step) + factor

    def get_lr(self) -> list[float | torch.Tensor]:
        """The lr of each group after `last_epoch` steps."""
        factor = self.factor(self.last_epoch)
        return [base_lr * factor for base_lr in self.base_lrs]

    # what torch asks when `step` is given an epoch to jump to
    _get_closed_form_lr = get_lr


def _points(schedule: Any) -> dict[int, float]:
    """The schedule by rising steps, beginning at 0."""
    if not isinstance(schedule, Mapping) or not schedule:
        raise ValueError(f"schedule must be a dict {{step: factor}} that is not empty, got {schedule!r}")
    for step, factor in schedule.items():
        if isinstance(step, bool) or not isinstance(step, numbers.Integral) or step < 0:
            raise ValueError(f"schedule must have integers of at least 0 as steps, got {step!r}")
        checks.at_least_zero(f"schedule[{step}]", factor)
    points = {0: 0.0} | {int(step): float(factor) for step, factor in schedule.items()}
    return dict(sorted(points.items()))
