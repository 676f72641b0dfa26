"""Exponential moving average of the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .. import checks
from .parameter_pass import ParameterPass
from .wrapper import Wrapper


class EMA(Wrapper):
    """Moving average of the parameters, for evaluation (Polyak and Juditsky 1992).

        e = decay * e + (1 - decay) * p              after each step, from e = 0
        the average is e / (1 - decay^n)             n steps averaged so far

    The average is float32 whatever the parameter's dtype, and is updated in one pass that reads p and e and
    writes e: 12 bytes a parameter in fp32, where AdamW's own step moves 28.

    Args:
        optimizer: one of danlu's or of torch's, or `Lookahead` around one.
        decay: of the average, in [0, 1).

    Every parameter of the optimizer is averaged after each of its steps, with or without a gradient; inside
    `swap()` a step raises RuntimeError. Nothing but parameters is averaged: buffers, as the statistics of
    batch norm, are the model's own. The state_dict holds `ema` and its `ema_step` (n) for each parameter,
    beside the optimizer's state.

    Raises:
        ValueError: decay is out of its range.
        TypeError: the optimizer cannot be wrapped.

    >>> p = torch.nn.Parameter(torch.tensor([0.0]))
    >>> opt = danlu.EMA(torch.optim.SGD([p], lr=1.0), decay=0.5)
    >>> for _ in range(2):
    ...     p.grad = torch.tensor([-3.0])
    ...     opt.step()
    >>> with opt.swap():
    ...     print(p.tolist())
    [5.0]
    >>> p.tolist()
    [6.0]
    """

    rank = 3

    def __init__(self, optimizer: torch.optim.Optimizer, decay: float = 0.999) -> None:
        self.check_order(optimizer)
        checks.unit_interval("decay", decay)
        super().__init__(optimizer, _Average(optimizer, decay=decay))
        self._swapped = False

    @property
    def decay(self) -> float:
        return float(self._pass._hyper["decay"])

    def _step(self, closure: Callable[[], Any] | None) -> Any:
        if self._swapped:
            raise RuntimeError("EMA: a step inside swap() would train the averages")
        loss = self.optimizer.step(closure)
        self._pass.step()
        self.stepped = True
        return loss

    @contextmanager
    def swap(self) -> Iterator[None]:
        """Puts the averages in the parameters' place, and the parameters back in the end.

        Holds a copy of the parameters meanwhile. After an evaluation under `fully_shard`, call the model's
        `reshard()` before and after this: its root module goes on with the weights that it has gathered.

        Raises:
            RuntimeError: there is no average yet, or they are in place already.
        """
        if self._swapped:
            raise RuntimeError("EMA: the averages are in place already")
        averaged = {p: n for p, held in self._pass.state.items() if (n := held["step"].item())}
        if not averaged:
            raise RuntimeError("EMA: there is no average before the first step")
        kept = []
        self._swapped = True
        try:
            with torch.no_grad():
                for p, n in averaged.items():
                    kept.append((p, p.detach().clone()))
                    p.copy_(self._pass.state[p]["ema"] / (1 - self.decay**n))
            yield
        finally:
            with torch.no_grad():
                for p, weights in kept:
                    p.copy_(weights)
            self._swapped = False

    def settings(self) -> dict[str, Any]:
        return {"decay": self.decay}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "_swapped": False})


class _Average(ParameterPass):
    _rule = "average"
    state_names = ("ema",)
    takes_gradients = False
    outcome = "none"

    @staticmethod
    def coefficients(math: Any, *, step: Any, decay: float) -> dict[str, Any]:
        return dict(decay=decay, weight=1 - decay)

    @staticmethod
    def reference(
        p: torch.Tensor, g: torch.Tensor, e: torch.Tensor, *, step: float, decay: float
    ) -> torch.Tensor:
        e.mul_(decay).add_(p * (1 - decay))
        return p
