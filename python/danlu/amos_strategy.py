"""Learning rates, decays and a schedule from the analysis of Amos, for other optimizers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from . import checks
from .model_parameters import Pattern, Patterns, add_to_group, owned_parameters, table
from .sharding import refuse_lost_shape


def amos_strategy(
    model: nn.Module,
    alpha0: float = 1e-3,
    *,
    half_life: float,
    step_rms: float = 1.0,
    sigma: Mapping[Pattern, float] | None = None,
) -> AmosStrategy:
    """Su's strategy from the analysis of Amos for other optimizers (Jianlin Su 2022, kexue.fm/archives/9344).

        lr = alpha0 * sigma / step_rms * f(t)       lr * weight_decay = alpha0^2 / 2 * f(t)
        f(t) = 1 / (t / half_life + 1)

    A step then is alpha0 of the parameter's scale sigma, and the decay undoes what it adds to the distance
    from the goal. sigma is the standard deviation of a parameter with 2 or more dimensions, taken now: call
    this before training. It is 0.5 for all others, biases and the gains of norms.

    The decay must be decoupled and scaled by lr, so that it follows f with it: this is for `danlu.Lion`,
    `danlu.Tiger` without scale_parameter and `danlu.AdamW`, say, whose steps per unit of lr have a root mean
    square of 1 or not much less, but not for `danlu.Adam` or `danlu.AdaX`, nor for `danlu.LAMB`, whose steps
    are relative as they are. For Lion weight_decay is alpha0 / (2 * sigma).

    Args:
        model: whose parameters are taken, trained or not, each once.
        alpha0: how large a step is, relative to the parameter; about 1e-3.
        half_life: the number of steps after which lr and decay are half of what they were at first.
        step_rms: root mean square of the optimizer's steps at lr 1, without decay.
        sigma: what overrides the parameters' scales, {pattern: value}. A pattern is a regular expression that
            is searched in a parameter's name, any of them if it is tied, or a type of modules that it is in;
            the first that is found counts.

    Returns:
        The parameter groups with `params`, `param_names`, `lr` and `weight_decay`, and a function that makes
        the scheduler of an optimizer; as text, a table with a row for each parameter. A measured sigma is
        rounded to 3 digits, and parameters of equal sigma share a group.

    Raises:
        ValueError: an option is out of its range, a pattern is found nowhere, or a parameter with 2 or more
            dimensions has no scale to measure, since it is constant.

    >>> model = torch.nn.Linear(2, 1)
    >>> _ = torch.nn.init.constant_(model.bias, 0.0), model.weight.data.copy_(torch.tensor([[0.25, -0.25]]))
    >>> strategy = danlu.amos_strategy(model, 0.01, half_life=1000)
    >>> print(strategy)
    parameter  shape   sigma  lr      weight_decay
    weight     (1, 2)  0.25   0.0025  0.02
    bias       (1,)    0.5    0.005   0.01
    >>> groups, scheduler = strategy
    >>> optimizer = danlu.Lion(groups)
    >>> schedule = scheduler(optimizer)  # after each of the optimizer's steps: schedule.step()
    """
    for name, value in dict(alpha0=alpha0, half_life=half_life, step_rms=step_rms).items():
        _positive(name, value)
    for pattern, value in (sigma or {}).items():
        _positive(f"sigma[{pattern!r}]", value)
    overrides = Patterns("sigma", sigma or {})
    strategy = AmosStrategy(float(half_life))
    for owned in owned_parameters(model):
        p, name = owned.p, owned.names[0]
        scale = overrides.find(owned, None)
        if scale is None:
            refuse_lost_shape(name, p, "its scale is that of its whole")
            scale = _measured(name, p) if p.ndim >= 2 else 0.5
        row = Row(name, tuple(p.shape), scale, alpha0 * scale / step_rms, alpha0 * step_rms / (2 * scale))
        strategy.add(p, row)
    overrides.check()
    return strategy


@dataclass(frozen=True)
class Row:
    """The setting of one parameter."""

    name: str
    shape: tuple[int, ...]
    sigma: float
    lr: float
    weight_decay: float


class AmosStrategy:
    """Parameter groups and a scheduler for them; unpacks to both, and prints as a table of the parameters."""

    def __init__(self, half_life: float) -> None:
        self.groups: list[dict[str, Any]] = []
        self.rows: list[Row] = []
        self.half_life = half_life

    def scheduler(self, optimizer: torch.optim.Optimizer) -> LambdaLR:
        """Multiplies every group's lr by f(t), t being the steps made: call its `step` after each."""
        return LambdaLR(optimizer, partial(inverse_time, self.half_life))

    def add(self, p: nn.Parameter, row: Row) -> None:
        """Puts the parameter with those of equal sigma."""
        self.rows.append(row)
        add_to_group(self.groups, p, row.name, lr=row.lr, weight_decay=row.weight_decay)

    def __iter__(self) -> Iterator[Any]:
        return iter((self.groups, self.scheduler))

    def __str__(self) -> str:
        rows = [
            (row.name, row.shape, *(f"{number:.6g}" for number in (row.sigma, row.lr, row.weight_decay)))
            for row in self.rows
        ]
        return table([("parameter", "shape", "sigma", "lr", "weight_decay"), *rows])


def inverse_time(half_life: float, t: float) -> float:
    """f of `amos_strategy`."""
    return 1 / (t / half_life + 1)


def _measured(name: str, p: nn.Parameter) -> float:
    deviation = p.detach().double().std(correction=0).item() if p.numel() and not p.is_meta else math.nan
    if not 0 < deviation < math.inf:
        raise ValueError(f"{name}: a standard deviation of {deviation} is no scale; sigma must give one")
    return float(f"{deviation:.3g}")


def _positive(name: str, value: Any) -> None:
    checks.at_least_zero(name, value)
    if value == 0:
        raise ValueError(f"{name} must be greater than 0, got 0")
