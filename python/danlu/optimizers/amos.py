"""Amos."""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable
from typing import Any

import torch
from typing_extensions import Unpack

from .. import checks
from ..formula import sqrt
from ..optimizer import EngineOptions, FusedOptimizer, Params
from ..partial_sums import PartialSums, Reducing, Statistic, SummedDims


class Amos(FusedOptimizer):
    """Adaptive decay towards a parameter's expected scale (Tian & Parikh 2022, arXiv:2210.11693).

        g2 = mean(g^2)                                        over reduce_dims
        v = beta * v + (1 - beta) * g2;  r = (1 - beta^t) / v
        c = 1 / sqrt(1 + c_coef * sqrt(lr) * b);  d = 1 / (1 + d_coef * sqrt(lr * eta) * b)
        gamma = c * lr^2 * r * g2
        p = p - d * ((gamma / 2 + extra_l2) * p + lr * eta * sqrt(r) * g)
        b = b + gamma * (1 + b)

    With momentum p moves by an average of these steps. It starts at 0 and is not corrected.
    `danlu.amos_groups` gives each parameter of a model its eta and reduce_dims.

    Args:
        params: tensors, named tensors or parameter groups, as for any `torch.optim.Optimizer`.
        lr: learning rate (the paper's xi), a float or a tensor of one element.
        eta: expected scale of the parameters.
        beta: decay rate of v, in [0, 1).
        c_coef, d_coef: how fast steps shrink as b grows.
        extra_l2: a decay in addition to the adaptive one.
        momentum: decay rate of the steps' average; None or 0 for none. `OneCycleLR` and `CyclicLR` cycle it
            if you pass it here, and need cycle_momentum=False otherwise (docs/schedules.md).
        clip_value: bounds every element of the gradient; None for no bound.
        reduce_dims: the dimensions over which v and b are shared; None for all, () for none.
        engine: what every danlu optimizer takes, see `danlu.FusedOptimizer`.

    State per parameter: `step`; `variance` (v) and `decay` (b) of the parameter's shape but 1 along
    reduce_dims; with momentum `exp_avg` of the parameter's shape.

    Raises:
        ValueError: a hyper-parameter is out of its range.

    >>> p = torch.nn.Parameter(torch.tensor([1.0, -1.0]))
    >>> p.grad = torch.tensor([2.0, 2.0])
    >>> danlu.Amos([p], lr=0.5).step()
    >>> p.tolist()
    [0.375, -1.375]
    """

    state_names = ("variance", "decay", "exp_avg")
    optional_states = ("exp_avg",)  # momentum may be turned on later
    reduces = True

    def __init__(
        self,
        params: Params,
        lr: float | torch.Tensor,
        eta: float = 1.0,
        beta: float = 0.999,
        c_coef: float = 0.25,
        d_coef: float = 0.25,
        extra_l2: float = 0.0,
        momentum: float | None = None,
        clip_value: float | None = None,
        reduce_dims: tuple[int, ...] | None = None,
        **engine: Unpack[EngineOptions],
    ) -> None:
        defaults = dict(
            lr=lr,
            eta=eta,
            beta=beta,
            c_coef=c_coef,
            d_coef=d_coef,
            extra_l2=extra_l2,
            clip_value=clip_value,
            reduce_dims=reduce_dims,
        )
        if momentum is not None and momentum != 0:
            defaults["momentum"] = momentum  # else OneCycleLR would find it, and turn it on
        super().__init__(params, defaults, **engine)

    def states(self, group: dict[str, Any], shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        reduced = _reduced_dims(group, shape)
        found: dict[str, tuple[int, ...]] = {"variance": reduced, "decay": reduced}
        return {**found, "exp_avg": ()} if group.get("momentum") else found

    def rule(self, group: dict[str, Any], shape: tuple[int, ...]) -> str:
        runs = _runs(group, shape)
        momentum = "_momentum" if group.get("momentum") else ""
        if not any(reduced for reduced, _ in runs):
            return f"amos_elementwise{momentum}"
        return f"amos_rows{momentum}" if runs[-1][0] else f"amos_columns{momentum}"

    def matrix(
        self, group: dict[str, Any], shape: tuple[int, ...], part: tuple[int, ...] | None = None
    ) -> tuple[int, int, int] | None:
        runs = _runs(group, shape, part)
        if not any(reduced for reduced, _ in _runs(group, shape)):
            return 1, 1, math.prod(shape if part is None else part)
        kinds, sizes = zip(*runs, strict=True)
        if kinds in ((True,), (False, True)):
            return 1, math.prod(sizes[:-1]), sizes[-1]
        if kinds in ((True, False), (False, True, False)):
            return math.prod(sizes[:-2]), sizes[-2], sizes[-1]
        return None

    def sums(self, group: dict[str, Any], shape: tuple[int, ...]) -> tuple[tuple[Statistic, ...], ...]:
        dims = _reduced_dims(group, shape)
        return ((Statistic(dims),),) if dims else ()

    def summed_dims(self, group: dict[str, Any], shape: tuple[int, ...]) -> SummedDims:
        dims = reduced_dims(group["reduce_dims"], len(shape))
        return dims, dims

    def structure(self, group: dict[str, Any]) -> Hashable:
        reduce_dims = group["reduce_dims"]
        return None if reduce_dims is None else tuple(reduce_dims), bool(group.get("momentum"))

    def hyper(
        self, group: dict[str, Any], device: torch.device | None = None, variant: Hashable = None
    ) -> dict[str, Any]:
        return super().hyper({"momentum": None, **group}, device, variant)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        self.param_groups[-1].setdefault("momentum", None)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        if group.get("momentum") is not None:
            checks.unit_interval("momentum", group["momentum"])

    @staticmethod
    def check(
        *,
        lr: Any,
        eta: Any,
        beta: Any,
        c_coef: Any,
        d_coef: Any,
        extra_l2: Any,
        clip_value: Any,
        reduce_dims: Any,
        momentum: Any = None,  # a default only where it is on
    ) -> None:
        checks.learning_rate(lr)
        checks.unit_interval("beta", beta)
        numbers = dict(eta=eta, c_coef=c_coef, d_coef=d_coef, extra_l2=extra_l2)
        for name, value in numbers.items():
            checks.at_least_zero(name, value)
        if momentum is not None:
            checks.unit_interval("momentum", momentum)
        if clip_value is not None:
            checks.at_least_zero("clip_value", clip_value)
            if clip_value == 0:
                raise ValueError("clip_value must be greater than 0, got 0; None turns it off")
        check_dims("reduce_dims", reduce_dims)

    @staticmethod
    def coefficients(
        math: Any,
        *,
        step: Any,
        lr: Any,
        eta: Any,
        beta: Any,
        c_coef: Any,
        d_coef: Any,
        extra_l2: Any,
        momentum: Any,
        clip_value: Any,
        reduce_dims: Any,
    ) -> dict[str, Any]:
        return dict(
            beta=beta,
            weight=1 - beta,
            correction=1 - math.pow(beta, step),
            xi_squared=lr * lr,
            c_rate=c_coef * math.sqrt(lr),
            d_rate=d_coef * math.sqrt(lr * eta),
            scale=lr * eta,
            extra_l2=extra_l2,
            clip=math.inf if clip_value is None else clip_value,
            momentum=momentum or 0.0,
            momentum_weight=1 - (momentum or 0.0),
        )

    @staticmethod
    def reference(
        p: torch.Tensor,
        g: torch.Tensor,
        v: torch.Tensor,
        b: torch.Tensor,
        *averages: torch.Tensor,
        step: float,
        lr: float,
        eta: float,
        beta: float,
        c_coef: float,
        d_coef: float,
        extra_l2: float,
        momentum: float | None,
        clip_value: float | None,
        reduce_dims: tuple[int, ...] | None,
    ) -> Reducing:
        if clip_value is not None:
            g = g.clamp(-clip_value, clip_value)
        g2 = g * g
        dims = reduced_dims(reduce_dims, p.ndim)
        if dims:
            squares = PartialSums.over(g2, dims)
            yield [squares]
            if squares.count == 0:
                return torch.zeros_like(p)  # a mean over nothing would leave NaN in v
            g2 = squares.mean().clamp(max=torch.finfo(p.dtype).max).to(p.dtype)
        v.mul_(beta).add_(g2 * (1 - beta))
        rv = torch.full_like(v, 1 - beta**step) / v.clamp(min=2.0**-125)
        c = sqrt(b * (c_coef * math.sqrt(lr)) + 1).reciprocal()
        d = (b * (d_coef * math.sqrt(lr * eta)) + 1).reciprocal()
        gamma = ((c * (lr * lr)) * rv) * g2
        amount = p * (d * (gamma * 0.5 + extra_l2)) + g * (d * (sqrt(rv) * (lr * eta)))
        b.add_(gamma * (b + 1))
        for m in averages:
            amount = m.mul_(momentum or 0.0).add_(amount * (1 - (momentum or 0.0)))
        return amount


def check_dims(name: str, value: Any) -> None:
    if value is None or (isinstance(value, tuple | list) and all(type(d) is int for d in value)):
        return
    raise ValueError(f"{name} must be a tuple of integers or None, got {value!r}")


def reduced_dims(reduce_dims: tuple[int, ...] | None, ndim: int) -> tuple[int, ...]:
    """The option as sorted numbers from 0 on; a dimension that a parameter of ndim does not have raises."""
    if reduce_dims is None:
        return tuple(range(ndim))
    for d in reduce_dims:
        if not -ndim <= d < ndim:
            raise ValueError(f"reduce_dims must be dimensions of the parameter, which has {ndim}, got {d}")
    return tuple(sorted({d % ndim for d in reduce_dims}))


def _reduced_dims(group: dict[str, Any], shape: tuple[int, ...]) -> tuple[int, ...]:
    """Those that means are taken over; none where all have one element."""
    reduced = reduced_dims(group["reduce_dims"], len(shape))
    return reduced if any(kind for kind, _ in _runs(group, shape)) else ()


def _runs(
    group: dict[str, Any], shape: tuple[int, ...], part: tuple[int, ...] | None = None
) -> list[tuple[bool, int]]:
    """Neighbouring dimensions that are all reduced, or all kept, and how many elements they span in a part
    of a parameter of that shape; part: its shape, None for the whole.
    """
    reduced = reduced_dims(group["reduce_dims"], len(shape))
    sizes = zip(shape, shape if part is None else part, strict=True)
    long = [(d in reduced, own) for d, (size, own) in enumerate(sizes) if size != 1 or own != 1]
    if not long:  # of one element: its mean is itself
        long = [(bool(reduced) or not shape, 1)]
    return [
        (kind, math.prod(size for _, size in run)) for kind, run in itertools.groupby(long, lambda d: d[0])
    ]
