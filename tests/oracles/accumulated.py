"""Gradient accumulation in its plainest form."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch


class Accumulated:
    """Keeps `every` gradients of each parameter, then makes one step of another optimizer on their mean."""

    def __init__(
        self, make: Callable[..., Any], params: Sequence[torch.Tensor], every: int, **hyper: Any
    ) -> None:
        self._inner = make(params, **hyper)
        self._every = every
        self._kept: list[list[torch.Tensor]] = []
        self.param_groups = self._inner.param_groups
        self.state = self._inner.state

    def step(self) -> None:
        params = self.param_groups[0]["params"]
        self._kept.append([p.grad for p in params])
        if len(self._kept) == self._every:
            for p, *gradients in zip(params, *self._kept, strict=True):
                p.grad = torch.stack(gradients).mean(0)
            self._inner.step()
            self._kept.clear()
