"""AdaX as the paper writes it, in decimals."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Context, Decimal, localcontext
from typing import Any

import torch

# enough for (1 + beta2)^t - 1 with beta2 = 1e-20; the largest exponent belongs to t in the millions
EXACT = Context(prec=50, Emin=-(10**6), Emax=10**6)


class PaperAdaX:
    """The recursion of arXiv:2004.09740, one number at a time.

        m_t = beta1 * m + (1 - beta1) * g
        v_t = (1 + beta2) * v + beta2 * g^2
        S   = (1 + beta2)^t - 1

    v_t grows without bound, and in float64 S is off by 1e-12 in the first steps. Decimals know neither.
    Only parameters are rounded, once a step. What `state` shows is m_t and v_t / S, as danlu keeps them.
    """

    def __init__(self, params: Sequence[torch.Tensor], *, decoupled: bool, **hyper: Any) -> None:
        self.param_groups = [dict(params=list(params), **hyper)]
        self._decoupled = decoupled
        self._t = 0
        self._m = [[Decimal(0)] * p.numel() for p in params]
        self._v = [[Decimal(0)] * p.numel() for p in params]

    def start_late(self, t: int, m: Sequence[torch.Tensor], v: Sequence[torch.Tensor]) -> None:
        """As if t updates had been made, and had left m_t and v_t / S."""
        self._t = t
        with localcontext(EXACT):
            total = self._total()
            self._m = [[Decimal(x) for x in tensor.tolist()] for tensor in m]
            self._v = [[Decimal(x) * total for x in tensor.tolist()] for tensor in v]

    @property
    def state(self) -> dict[torch.Tensor, dict[str, torch.Tensor]]:
        def rounded(numbers: list[Decimal]) -> torch.Tensor:
            return torch.tensor([float(x) for x in numbers], dtype=torch.float64)

        with localcontext(EXACT):
            total = self._total()
            return {
                p: dict(exp_avg=rounded(m), exp_avg_sq=rounded([x / total for x in v]))
                for p, m, v in zip(self.param_groups[0]["params"], self._m, self._v, strict=True)
            }

    def step(self) -> None:
        self._t += 1
        group = self.param_groups[0]
        with localcontext(EXACT):
            lr, decay, eps = (Decimal(float(group[name])) for name in ("lr", "weight_decay", "eps"))
            beta1, beta2 = map(Decimal, group["betas"])
            total = self._total()

            def update(m: Decimal, v: Decimal) -> Decimal:
                if group["eps_mode"] == "official":
                    # the authors' code corrects the step, not v
                    return lr * total.sqrt() * m / (v.sqrt() + eps)
                if group["eps_mode"] == "hat":
                    return lr * m / ((v / total).sqrt() + eps)
                return lr * m / (v / total + eps).sqrt()

            for p, m, v in zip(group["params"], self._m, self._v, strict=True):
                x = [Decimal(number) for number in p.tolist()]
                for i, number in enumerate(p.grad.tolist()):
                    g = Decimal(number)
                    if not self._decoupled:
                        g += decay * x[i]
                    m[i] = beta1 * m[i] + (1 - beta1) * g
                    v[i] = (1 + beta2) * v[i] + beta2 * g**2
                    shrunk = lr * decay * x[i] if self._decoupled else 0
                    x[i] -= update(m[i], v[i]) + shrunk
                p.copy_(torch.tensor([float(number) for number in x], dtype=torch.float64))

    def _total(self) -> Decimal:
        return (1 + Decimal(self.param_groups[0]["betas"][1])) ** self._t - 1
