"""Lion."""

from __future__ import annotations

from typing import Any

import torch
from typing_extensions import Unpack

from .. import checks
from ..formula import sign
from ..optimizer import EngineOptions, FusedOptimizer, Params


class Lion(FusedOptimizer):
    """Evolved sign momentum (Chen et al. 2023, arXiv:2302.06675).

        c = beta1 * m + (1 - beta1) * g
        p = p - (lr * sign(c) + lr * weight_decay * p)
        m = beta2 * m + (1 - beta2) * g

    Use an lr 3 to 10 times smaller than AdamW's and a weight_decay as many times larger.

    Args:
        params: tensors, named tensors or parameter groups, as for any `torch.optim.Optimizer`.
        lr: learning rate, a float or a tensor of one element.
        betas: decay rates of the interpolation c and of the momentum m, each in [0, 1).
        weight_decay: decoupled; the parameter loses `lr * weight_decay` of itself in a step.
        engine: what every danlu optimizer takes, see `danlu.FusedOptimizer`.

    State per parameter: `step`, and `exp_avg` (m) of the parameter's shape.

    Raises:
        ValueError: a hyper-parameter is out of its range.

    >>> p = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    >>> p.grad = torch.tensor([0.5, 0.0])
    >>> danlu.Lion([p], lr=0.25).step()
    >>> p.tolist()
    [0.75, -2.0]
    """

    state_names = ("exp_avg",)
    optional_states = ("step",)  # the rule does not read it, other libraries have none

    def __init__(
        self,
        params: Params,
        lr: float | torch.Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        **engine: Unpack[EngineOptions],
    ) -> None:
        super().__init__(params, dict(lr=lr, betas=betas, weight_decay=weight_decay), **engine)

    @staticmethod
    def check(*, lr: Any, betas: Any, weight_decay: Any) -> None:
        checks.learning_rate(lr)
        checks.betas(betas)
        checks.at_least_zero("weight_decay", weight_decay)

    @staticmethod
    def coefficients(math: Any, *, step: Any, lr: Any, betas: Any, weight_decay: Any) -> dict[str, Any]:
        beta1, beta2 = betas
        return dict(
            beta1=beta1, weight1=1 - beta1, beta2=beta2, weight2=1 - beta2, lr=lr, decay=lr * weight_decay
        )

    @staticmethod
    def reference(
        p: torch.Tensor,
        g: torch.Tensor,
        m: torch.Tensor,
        *,
        step: float,
        lr: float,
        betas: tuple[float, float],
        weight_decay: float,
    ) -> torch.Tensor:
        beta1, beta2 = betas
        c = m * beta1 + g * (1 - beta1)
        m.mul_(beta2).add_(g * (1 - beta2))
        return sign(c) * lr + p * (lr * weight_decay)
