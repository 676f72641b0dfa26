"""Tiger."""

from __future__ import annotations

import math
from typing import Any

import torch
from typing_extensions import Unpack

from .. import checks
from ..formula import sign
from ..optimizer import EngineOptions, FusedOptimizer, Params
from ..partial_sums import PartialSums, Reducing, Statistic, SummedDims


class Tiger(FusedOptimizer):
    """Tight-fisted optimizer: one state, which also accumulates (Jianlin Su 2023, kexue.fm/archives/9512).

        m = beta * m + (1 - beta) * g
        p = p - (lr * sign(m) + lr * weight_decay * p)

    With `accumulation_steps=k` each call of `step()` takes one of k gradients. The parameter moves at the
    last one: exactly one step on their mean, with no buffer.

        m = (beta at the first of k, else 1) * m + ((1 - beta) / k) * g

    With `scale_parameter=True` a group's `kind` decides what replaces lr. For "matrix" it is lr * rms(p). For
    "embedding" it is lr times the rms of each row (along the last dimension). For "vector", biases and the
    parameters of norms, it is lr / 2, without decay. A matrix of zeros never moves.

    Args:
        params: tensors, named tensors or parameter groups, as for any `torch.optim.Optimizer`.
        lr: learning rate, a float or a tensor of one element.
        beta: decay rate of the momentum m, in [0, 1). `OneCycleLR` and `CyclicLR` need cycle_momentum=False
            (docs/schedules.md).
        weight_decay: decoupled; the parameter loses `lr * weight_decay` of itself in an update.
        accumulation_steps: gradients for one update, at least 1. Each parameter counts its own gradients.
        scale_parameter: whether steps are relative to the parameter's root mean square.
        kind: "matrix", "embedding" or "vector", usually set by the group; required with scale_parameter.
        engine: what every danlu optimizer takes, see `danlu.FusedOptimizer`.

    State per parameter: `step` (updates made), `exp_avg` (m) of the parameter's shape, and with accumulation
    `micro_step` (gradients taken since the last update).

    Raises:
        ValueError: a hyper-parameter is out of its range, or a group with scale_parameter has no kind.

    >>> p = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    >>> opt = danlu.Tiger([p], lr=0.25, weight_decay=0.0, accumulation_steps=2)
    >>> for g in ([1.0, 1.0], [1.0, -3.0]):
    ...     p.grad = torch.tensor(g)
    ...     opt.step()
    ...     print(p.tolist())
    [1.0, -2.0]
    [0.75, -1.75]

    >>> w, b = torch.nn.Parameter(torch.tensor([[1.0, -7.0]])), torch.nn.Parameter(torch.tensor([0.0]))
    >>> groups = [{"params": [w], "kind": "matrix"}, {"params": [b], "kind": "vector"}]
    >>> opt = danlu.Tiger(groups, lr=0.25, weight_decay=0.0, scale_parameter=True)
    >>> w.grad, b.grad = torch.ones(1, 2), torch.ones(1)
    >>> opt.step()
    >>> w.tolist(), b.tolist()
    ([[-0.25, -8.25]], [-0.125])
    """

    state_names = ("exp_avg",)
    optional_states = ("step",)  # the rule does not read it

    def __init__(
        self,
        params: Params,
        lr: float | torch.Tensor = 1e-3,
        beta: float = 0.965,
        weight_decay: float = 0.01,
        accumulation_steps: int = 1,
        scale_parameter: bool = False,
        kind: str | None = None,
        **engine: Unpack[EngineOptions],
    ) -> None:
        defaults = dict(
            lr=lr,
            beta=beta,
            weight_decay=weight_decay,
            accumulation_steps=accumulation_steps,
            scale_parameter=scale_parameter,
            kind=kind,
        )
        super().__init__(params, defaults, **engine)

    @property
    def reduces(self) -> bool:  # type: ignore[override]
        return any(_scaled_kind(group) for group in self.param_groups)

    def rule(self, group: dict[str, Any], shape: tuple[int, ...]) -> str:
        return {"matrix": "tiger_matrix", "embedding": "tiger_rows"}.get(_scaled_kind(group) or "", "tiger")

    def matrix(
        self, group: dict[str, Any], shape: tuple[int, ...], part: tuple[int, ...] | None = None
    ) -> tuple[int, int, int] | None:
        part = shape if part is None else part
        if _scaled_kind(group) == "embedding" and len(shape) > 1:
            return 1, math.prod(part[:-1]), part[-1]
        return 1, 1, math.prod(part)

    def sums(self, group: dict[str, Any], shape: tuple[int, ...]) -> tuple[tuple[Statistic, ...], ...]:
        match _scaled_kind(group):
            case None:
                return ()
            case "embedding" if shape:
                return ((Statistic((len(shape) - 1,)),),)
            case _:
                return ((Statistic.of_all(shape),),)

    def summed_dims(self, group: dict[str, Any], shape: tuple[int, ...]) -> SummedDims:
        return (len(shape) - 1,) if shape else (), ()

    def accumulation_steps(self, group: dict[str, Any]) -> int:
        return int(group["accumulation_steps"])

    @staticmethod
    def check(
        *, lr: Any, beta: Any, weight_decay: Any, accumulation_steps: Any, scale_parameter: Any, kind: Any
    ) -> None:
        checks.learning_rate(lr)
        checks.unit_interval("beta", beta)
        checks.at_least_zero("weight_decay", weight_decay)
        checks.positive_int("accumulation_steps", accumulation_steps)
        checks.one_of("scale_parameter", scale_parameter, (False, True))
        if scale_parameter or kind is not None:
            checks.one_of("kind", kind, KINDS)

    @staticmethod
    def coefficients(
        math: Any,
        *,
        step: Any,
        micro_step: Any,
        lr: Any,
        beta: Any,
        weight_decay: Any,
        accumulation_steps: int,
        scale_parameter: bool,
        kind: str | None,
    ) -> dict[str, Any]:
        keep = math.where(micro_step == 0, beta, 1.0)
        weight = (1 - beta) / accumulation_steps
        if not scale_parameter:
            return dict(keep=keep, weight=weight, eta=lr, decay=lr * weight_decay)
        checks.one_of("kind", kind, KINDS)  # the group may have changed
        if kind == "vector":
            return dict(keep=keep, weight=weight, eta=0.5 * lr, decay=0.0)
        return dict(keep=keep, weight=weight, lr=lr, weight_decay=weight_decay)

    @staticmethod
    def reference(
        p: torch.Tensor,
        g: torch.Tensor,
        m: torch.Tensor,
        *,
        step: float,
        micro_step: float,
        lr: float,
        beta: float,
        weight_decay: float,
        accumulation_steps: int,
        scale_parameter: bool,
        kind: str | None,
    ) -> Reducing:
        if micro_step == 0:
            m.mul_(beta)
        m.add_(g * ((1 - beta) / accumulation_steps))
        if not scale_parameter:
            return sign(m) * lr + p * (lr * weight_decay)
        if kind == "vector":
            return sign(m) * (0.5 * lr)
        squares = PartialSums.over(
            p.double().square(), (p.ndim - 1,) if kind == "embedding" and p.ndim else None
        )
        yield [squares]
        eta = squares.mean().sqrt().to(p.dtype) * lr
        return sign(m) * eta + p * (eta * weight_decay)


KINDS = ("matrix", "embedding", "vector")


def _scaled_kind(group: dict[str, Any]) -> str | None:
    """What the group's steps are scaled by, if by sums over its parameters."""
    return group["kind"] if group["scale_parameter"] and group["kind"] != "vector" else None
