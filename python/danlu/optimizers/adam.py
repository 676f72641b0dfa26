"""Adam and AdamW."""

from __future__ import annotations

from typing import Any

import torch
from typing_extensions import Unpack

from .. import checks
from ..formula import sqrt
from ..optimizer import EngineOptions, FusedOptimizer, Params


class Adam(FusedOptimizer):
    """Adaptive moments (Kingma & Ba 2014, arXiv:1412.6980), weight decay as part of the gradient.

        g = g + weight_decay * p
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g^2
        p = p - lr / (1 - beta1^t) * m / (sqrt(v / (1 - beta2^t)) + eps)

    Args:
        params: tensors, named tensors or parameter groups, as for any `torch.optim.Optimizer`.
        lr: learning rate, a float or a tensor of one element.
        betas: decay rates of m and v, each in [0, 1).
        eps: added to the root of the corrected v, at least 0.
        weight_decay: coefficient of the L2 penalty.
        amsgrad: only False; the variant is not offered.
        engine: what every danlu optimizer takes, see `danlu.FusedOptimizer`.

    State per parameter, named as in torch, whose state_dict loads as it is: `step`, `exp_avg` (m),
    `exp_avg_sq` (v).

    Raises:
        ValueError: a hyper-parameter is out of its range, or amsgrad is asked for.

    >>> p = torch.nn.Parameter(torch.tensor([1.0]))
    >>> p.grad = torch.tensor([4.0])
    >>> danlu.Adam([p], lr=0.25).step()
    >>> p.tolist()
    [0.75]
    """

    state_names = ("exp_avg", "exp_avg_sq")
    _decoupled = False

    def __init__(
        self,
        params: Params,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        **engine: Unpack[EngineOptions],
    ) -> None:
        defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, amsgrad=amsgrad)
        super().__init__(params, defaults, **engine)

    def translate(self, loaded: dict[str, Any]) -> dict[str, Any]:
        groups = []
        for group in loaded["param_groups"]:
            group = dict(group)
            for name in ("bias_correction", "correct_bias"):  # of apex and of transformers
                if not group.pop(name, True):
                    raise ValueError(f"{name} must be True: the moments are always corrected")
            decoupled = group.get("decoupled_weight_decay", False) and group.get("weight_decay", 0) != 0
            if decoupled and not self._decoupled:
                raise ValueError("decoupled_weight_decay must be False: danlu.AdamW is what has it")
            groups.append(group)
        return {**loaded, "param_groups": groups}

    @staticmethod
    def check(*, lr: Any, betas: Any, eps: Any, weight_decay: Any, amsgrad: Any) -> None:
        checks.learning_rate(lr)
        checks.betas(betas)
        checks.at_least_zero("eps", eps)
        checks.at_least_zero("weight_decay", weight_decay)
        if amsgrad:
            raise ValueError("amsgrad is not offered: amsgrad must be False")

    @staticmethod
    def coefficients(
        math: Any, *, step: Any, lr: Any, betas: Any, eps: Any, weight_decay: Any
    ) -> dict[str, Any]:
        return dict(_folded(math, step, lr, betas), eps=eps, weight_decay=weight_decay)

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
    ) -> torch.Tensor:
        g = g + p * weight_decay
        lr1 = float(lr / (1 - betas[0] ** step))
        return _direction(g, m, v, step, betas, eps) * lr1


class AdamW(Adam):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2017, arXiv:1711.05101).

        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g^2
        p = p - (lr / (1 - beta1^t) * m / (sqrt(v / (1 - beta2^t)) + eps) + lr * weight_decay * p)

    Arguments, state and errors are `Adam`'s, but `weight_decay` is decoupled and 0.01 by default: the
    parameter loses `lr * weight_decay` of itself in a step.

    >>> p = torch.nn.Parameter(torch.tensor([1.0]))
    >>> p.grad = torch.tensor([4.0])
    >>> danlu.AdamW([p], lr=0.25, weight_decay=0.5).step()
    >>> p.tolist()
    [0.625]
    """

    _decoupled = True

    def __init__(
        self,
        params: Params,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        **engine: Unpack[EngineOptions],
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, **engine)

    @staticmethod
    def coefficients(
        math: Any, *, step: Any, lr: Any, betas: Any, eps: Any, weight_decay: Any
    ) -> dict[str, Any]:
        return dict(_folded(math, step, lr, betas), eps=eps, decay=lr * weight_decay)

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
    ) -> torch.Tensor:
        lr1 = float(lr / (1 - betas[0] ** step))
        return _direction(g, m, v, step, betas, eps) * lr1 + p * (lr * weight_decay)


def _folded(math: Any, step: Any, lr: Any, betas: Any) -> dict[str, Any]:
    """The coefficients that both share: bias corrections included, of m in lr1 and of v in root2."""
    beta1, beta2 = betas
    return dict(
        beta1=beta1,
        weight1=1 - beta1,
        beta2=beta2,
        weight2=1 - beta2,
        lr1=lr / (1 - math.pow(beta1, step)),
        root2=1 / math.sqrt(1 - math.pow(beta2, step)),
    )


def _direction(
    g: torch.Tensor, m: torch.Tensor, v: torch.Tensor, step: float, betas: tuple[float, float], eps: float
) -> torch.Tensor:
    """m / (sqrt(corrected v) + eps) from the new moments."""
    beta1, beta2 = betas
    m.mul_(beta1).add_(g * (1 - beta1))
    v.mul_(beta2).add_((g * (1 - beta2)) * g)
    return m / (sqrt(v) * float(1 / (1 - beta2**step) ** 0.5) + eps)
