"""LAMB."""

from __future__ import annotations

from typing import Any

import torch
from typing_extensions import Unpack

from .. import checks
from ..formula import sqrt
from ..optimizer import EngineOptions, FusedOptimizer, Params
from ..partial_sums import PartialSums, Reducing, Statistic


class LAMB(FusedOptimizer):
    """Adam with a step as large as the parameter allows (You et al. 2019, arXiv:1904.00962).

        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g^2
        u = (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps) + weight_decay * p
        p = p - lr * (|p| / |u|) * u

    The norms are over a parameter. Their ratio is 1 if either is 0.

    Args:
        params: tensors, named tensors or parameter groups, as for any `torch.optim.Optimizer`.
        lr: learning rate, a float or a tensor of one element.
        betas: decay rates of m and v, each in [0, 1).
        eps: added to the root of the corrected v, at least 0.
        weight_decay: part of u, so the ratio scales it, too.
        bias_correction: whether m and v are divided by their sums of weights; the authors' code does not.
        trust_clip: whether the ratio is at most 1.
        always_adapt: False sets the ratio to 1 in groups without weight decay.
        engine: what every danlu optimizer takes, see `danlu.FusedOptimizer`.

    State per parameter, named as AdamW's: `step`, `exp_avg` (m), `exp_avg_sq` (v).

    Raises:
        ValueError: a hyper-parameter is out of its range.

    >>> p = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    >>> p.grad = torch.tensor([1.0, 0.0])
    >>> danlu.LAMB([p], lr=0.25, betas=(0.0, 0.75), eps=0.5, weight_decay=0.0, bias_correction=False).step()
    >>> p.tolist()
    [1.75, 4.0]
    """

    state_names = ("exp_avg", "exp_avg_sq")
    also_loads = ("amsgrad",)  # of AdamW, whose states these are
    reduces = True

    def __init__(
        self,
        params: Params,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        bias_correction: bool = True,
        trust_clip: bool = False,
        always_adapt: bool = True,
        **engine: Unpack[EngineOptions],
    ) -> None:
        defaults = dict(
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            bias_correction=bias_correction,
            trust_clip=trust_clip,
            always_adapt=always_adapt,
        )
        super().__init__(params, defaults, **engine)

    def sums(self, group: dict[str, Any], shape: tuple[int, ...]) -> tuple[tuple[Statistic, ...], ...]:
        return ((Statistic.of_all(shape),) * 2,)

    @staticmethod
    def check(*, lr: Any, betas: Any, eps: Any, weight_decay: Any, **flags: Any) -> None:
        checks.learning_rate(lr)
        checks.betas(betas)
        checks.at_least_zero("eps", eps)
        checks.at_least_zero("weight_decay", weight_decay)
        for name, flag in flags.items():
            checks.one_of(name, flag, (False, True))

    @staticmethod
    def coefficients(
        math: Any,
        *,
        step: Any,
        lr: Any,
        betas: Any,
        eps: Any,
        weight_decay: Any,
        bias_correction: bool,
        trust_clip: bool,
        always_adapt: bool,
    ) -> dict[str, Any]:
        beta1, beta2 = betas
        return dict(
            beta1=beta1,
            weight1=1 - beta1,
            beta2=beta2,
            weight2=1 - beta2,
            root2=1 / math.sqrt(1 - math.pow(beta2, step)) if bias_correction else 1.0,
            eps=eps,
            correction1=1 / (1 - math.pow(beta1, step)) if bias_correction else 1.0,
            weight_decay=weight_decay,
            lr=lr,
            adapt=float(always_adapt or weight_decay != 0),
            max_ratio=1.0 if trust_clip else math.inf,
        )

    @staticmethod
    def reference(
        p: torch.Tensor,
        g: torch.Tensor,
        m: torch.Tensor,
        v: torch.Tensor,
        *,
        step: float,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        bias_correction: bool,
        trust_clip: bool,
        always_adapt: bool,
    ) -> Reducing:
        beta1, beta2 = betas
        correction1 = 1 / (1 - beta1**step) if bias_correction else 1.0
        root2 = 1 / (1 - beta2**step) ** 0.5 if bias_correction else 1.0
        m.mul_(beta1).add_(g * (1 - beta1))
        v.mul_(beta2).add_((g * (1 - beta2)) * g)
        u = (m / (sqrt(v) * root2 + eps)) * correction1 + p * weight_decay
        squares = [PartialSums.over(x.double().square()) for x in (p, u)]
        yield squares
        ratio = _trust_ratio(squares[0], squares[1], always_adapt or weight_decay != 0, trust_clip)
        return u * (lr * ratio)


def _trust_ratio(p: PartialSums, u: PartialSums, adapt: bool, clip: bool) -> float:
    """Of squares. A NaN leaves it at 1: the element that has it shows by itself."""
    p_norm, u_norm = (squares.values.sqrt().item() for squares in (p, u))
    ratio = p_norm / u_norm if adapt and p_norm > 0 and u_norm > 0 else 1.0
    return min(ratio, 1.0) if clip else ratio
