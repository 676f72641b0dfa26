"""The learning rate of an optimizer with a schedule of its own, for what wants a scheduler."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler

from .optimizers.adafactor import Adafactor


class RelativeStepLR(LRScheduler):
    """Reports the lr that `Adafactor` takes by itself with relative_step, and changes none.

    `get_last_lr()` and the groups have what the next step uses, as with torch's schedulers: rho, which a step
    multiplies by the size of each parameter. The lr of a group without relative_step is reported as it is. An
    lr whose counters are on a GPU is a tensor there.

    Args:
        optimizer: a `danlu.Adafactor`, or what is around one.
        last_epoch: counts the calls of `step`, as in torch; the lr follows from the optimizer's state.

    Raises:
        TypeError: there is no `danlu.Adafactor`.
        ValueError: none of its groups has relative_step.

    >>> p = torch.nn.Parameter(torch.ones(2))
    >>> optimizer = danlu.Adafactor([p], warmup_init=True)
    >>> schedule = danlu.RelativeStepLR(optimizer)
    >>> for _ in range(2):
    ...     print(schedule.get_last_lr())
    ...     p.grad = torch.ones(2)
    ...     optimizer.step()
    ...     schedule.step()
    [1e-06]
    [2e-06]
    """

    def __init__(self, optimizer: torch.optim.Optimizer, last_epoch: int = -1) -> None:
        if not any(group.get("relative_step") for group in _adafactor(optimizer).param_groups):
            raise ValueError("relative_step must be True in a group: without it the optimizer follows its lr")
        ours = [group for group in optimizer.param_groups if "initial_lr" not in group]
        for group in ours:
            group["initial_lr"] = group["lr"]  # torch asks for it
        super().__init__(optimizer, last_epoch)
        for group in ours:
            del group["initial_lr"]  # no factor multiplies it

    def get_lr(self) -> list[Any]:
        """The lr of each group in its next step."""
        inner = _adafactor(self.optimizer)
        return [
            inner.scheduled_lr(group, ahead=1) if group.get("relative_step") else group["lr"]
            for group in inner.param_groups
        ]


def _adafactor(optimizer: Any) -> Adafactor:
    """What is inside the wrappers of danlu and of trainers, which call it `optimizer`."""
    inner = optimizer
    while not isinstance(inner, Adafactor):
        if not hasattr(inner, "optimizer"):
            raise TypeError(f"optimizer must be a danlu.Adafactor, got {type(optimizer).__name__}")
        inner = inner.optimizer
    return inner
