"""AdaX and AdaXW."""

from __future__ import annotations

from math import expm1, inf, log1p
from typing import Any

import torch
from typing_extensions import Unpack

from .. import checks
from ..formula import sqrt
from ..optimizer import EngineOptions, FusedOptimizer, Params

EPS_MODES = ("official", "hat", "inside")
# fp32's smallest normal number: without a floor eps / sqrt(S) underflows near step 1.5e6, and an entry that
# never had a gradient would give 0 / 0
EPS_FLOOR = 2.0**-126


class AdaX(FusedOptimizer):
    """Adam with long-term memory (Li et al. 2020, arXiv:2004.09740), weight decay as part of the gradient.

        g = g + weight_decay * p
        m = beta1 * m + (1 - beta1) * g
        v = v + beta2 / S * (g^2 - v)                      S = (1 + beta2)^t - 1
        p = p - lr * m / (sqrt(v) + eps / sqrt(S))

    v is the paper's v_t divided by S. The algebra is the same, but the paper's form overflows fp32 near step
    887,000. m has no bias correction, on purpose. v forgets very slowly. So an element whose first gradients
    come after very many steps, in a row of an embedding say, meets a v near zero and jumps.

    Args:
        params: tensors, named tensors or parameter groups, as for any `torch.optim.Optimizer`.
        lr: learning rate, a float or a tensor of one element.
        betas: decay rate of m in [0, 1), and growth rate of the memory of v in (0, 1).
        eps: at least 0, added as `eps_mode` says.
        weight_decay: coefficient of the L2 penalty.
        eps_mode: `"official"` as above, which is the authors' code; `"hat"`: sqrt(v) + eps; `"inside"`:
            sqrt(v + eps).
        engine: what every danlu optimizer takes, see `danlu.FusedOptimizer`.

    State per parameter: `step`, `exp_avg` (m), `exp_avg_sq` (v as above; divide the authors' saved v by S).

    Raises:
        ValueError: a hyper-parameter is out of its range.

    >>> p = torch.nn.Parameter(torch.tensor([1.0]))
    >>> p.grad = torch.tensor([4.0])
    >>> danlu.AdaX([p], lr=2.5, betas=(0.9, 1e-4), weight_decay=0.0).step()
    >>> round(p.item(), 6)
    0.75
    """

    state_names = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        params: Params,
        lr: float | torch.Tensor = 1.5e-3,
        betas: tuple[float, float] = (0.9, 1e-4),
        eps: float = 1e-12,
        weight_decay: float = 5e-4,
        eps_mode: str = "official",
        **engine: Unpack[EngineOptions],
    ) -> None:
        defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, eps_mode=eps_mode)
        super().__init__(params, defaults, **engine)

    def rule(self, group: dict[str, Any], shape: tuple[int, ...]) -> str:
        return super().rule(group, shape) + ("_inside" if group["eps_mode"] == "inside" else "")

    @staticmethod
    def check(*, lr: Any, betas: Any, eps: Any, weight_decay: Any, eps_mode: Any) -> None:
        checks.learning_rate(lr)
        checks.betas(betas, zero2=False)
        checks.at_least_zero("eps", eps)
        checks.at_least_zero("weight_decay", weight_decay)
        checks.one_of("eps_mode", eps_mode, EPS_MODES)

    @staticmethod
    def coefficients(
        math: Any, *, step: Any, lr: Any, betas: Any, eps: Any, weight_decay: Any, eps_mode: str
    ) -> dict[str, Any]:
        return dict(_folded(math, step, betas, eps, eps_mode), lr=lr, weight_decay=weight_decay)

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
        eps_mode: str,
    ) -> torch.Tensor:
        return _direction(g + p * weight_decay, m, v, step, betas, eps, eps_mode) * lr


class AdaXW(AdaX):
    """AdaX with decoupled weight decay (arXiv:2004.09740).

        m = beta1 * m + (1 - beta1) * g
        v = v + beta2 / S * (g^2 - v)                      S = (1 + beta2)^t - 1
        p = p - (lr * m / (sqrt(v) + eps / sqrt(S)) + lr * weight_decay * p)

    Arguments, state and errors are `AdaX`'s, but `weight_decay` is decoupled: the parameter loses `lr *
    weight_decay` of itself in a step.

    >>> p = torch.nn.Parameter(torch.tensor([1.0]))
    >>> p.grad = torch.tensor([4.0])
    >>> danlu.AdaXW([p], lr=2.5, betas=(0.9, 1e-4), weight_decay=0.1).step()
    >>> round(p.item(), 6)
    0.5
    """

    def __init__(
        self,
        params: Params,
        lr: float | torch.Tensor = 5e-3,
        betas: tuple[float, float] = (0.9, 1e-4),
        eps: float = 1e-12,
        weight_decay: float = 5e-2,
        eps_mode: str = "official",
        **engine: Unpack[EngineOptions],
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, eps_mode, **engine)

    @staticmethod
    def coefficients(
        math: Any, *, step: Any, lr: Any, betas: Any, eps: Any, weight_decay: Any, eps_mode: str
    ) -> dict[str, Any]:
        return dict(_folded(math, step, betas, eps, eps_mode), lr=lr, decay=lr * weight_decay)

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
        eps_mode: str,
    ) -> torch.Tensor:
        return _direction(g, m, v, step, betas, eps, eps_mode) * lr + p * (lr * weight_decay)


def _folded(math: Any, step: Any, betas: Any, eps: Any, eps_mode: str) -> dict[str, Any]:
    """The coefficients that both share; the last is `eps_t`, or `eps` under the root."""
    beta1, beta2 = betas
    total = math.expm1(step * math.log1p(beta2))
    common = dict(beta1=beta1, weight1=1 - beta1, weight_t=beta2 / total)
    if eps_mode == "inside":
        return dict(common, eps=eps)
    if eps_mode == "official" and eps > 0:
        eps = math.maximum(eps / math.sqrt(total), EPS_FLOOR)
    return dict(common, eps_t=eps)


def _direction(
    g: torch.Tensor,
    m: torch.Tensor,
    v: torch.Tensor,
    step: float,
    betas: tuple[float, float],
    eps: float,
    eps_mode: str,
) -> torch.Tensor:
    """m over the root of v, from the new moments."""
    beta1, beta2 = betas
    exponent = step * log1p(beta2)
    total = expm1(exponent) if exponent < 709 else inf
    m.mul_(beta1).add_(g * (1 - beta1))
    weight_t = beta2 / total
    v.add_((g * weight_t) * g - v * weight_t)
    if eps_mode == "inside":
        return m / sqrt(v + eps)
    if eps_mode == "official" and eps > 0:
        eps = max(eps / total**0.5, EPS_FLOOR)
    return m / (sqrt(v) + eps)
