"""AdamW inside any of the wrappers, in plain float64 torch: one loop over what happens, in its order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

LR, BETA1, BETA2, EPS, DECAY = 1e-2, 0.8, 0.95, 1e-8, 0.1
STEPS, K, ALPHA, MU = 2, 2, 0.3, 0.8  # of accumulation, Lookahead, EMA


@dataclass
class Tensors:
    """Of one parameter."""

    p: torch.Tensor
    m: torch.Tensor
    v: torch.Tensor
    slow: torch.Tensor
    ema: torch.Tensor


class Nested:
    """`order`: names of the wrappers, from the innermost outwards; `mode` is that of Lazy."""

    def __init__(self, params: Sequence[torch.Tensor], order: Sequence[str], mode: str) -> None:
        self.all = [Tensors(p, *(torch.zeros_like(p) for _ in range(2)), p, 0 * p) for p in params]
        self._order, self._mode = order, mode
        self._gradients: list[Sequence[torch.Tensor]] = []
        self.steps = 0

    def call(self, gradients: Sequence[torch.Tensor]) -> None:
        self._gradients.append(gradients)
        if "GradientAccumulation" in self._order and len(self._gradients) < STEPS:
            return
        means = [sum(some) / len(some) for some in zip(*self._gradients, strict=True)]
        self._gradients = []
        self.steps += 1
        for x, g in zip(self.all, means, strict=True):
            self._step(x, g)
            for name in self._order:
                if name == "Lookahead" and self.steps % K == 0:
                    x.p = x.slow = (1 - ALPHA) * x.slow + ALPHA * x.p
                if name == "EMA":
                    x.ema = MU * x.ema + (1 - MU) * x.p

    def averages(self) -> list[torch.Tensor]:
        return [x.ema / (1 - MU**self.steps) for x in self.all]

    def _step(self, x: Tensors, g: torch.Tensor) -> None:
        everywhere = torch.ones_like(g, dtype=torch.bool)
        takes_part = (g != 0).any(1, keepdim=True) & everywhere if "Lazy" in self._order else everywhere
        moves = takes_part if self._mode == "rows" else everywhere
        x.m = torch.where(moves, BETA1 * x.m + (1 - BETA1) * g, x.m)
        x.v = torch.where(moves, BETA2 * x.v + (1 - BETA2) * g * g, x.v)
        m, v = x.m / (1 - BETA1**self.steps), x.v / (1 - BETA2**self.steps)
        step = LR * (m / (v.sqrt() + EPS) + DECAY * x.p)
        if "LayerAdaptation" in self._order:
            step = step * LR * x.p.norm() / step.norm()
        x.p = torch.where(takes_part, x.p - step, x.p)
