"""Exponential moving average of the weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .. import checks
from .parameter_pass import ParameterPass
from .wrapper import Wrapper


class EMA(Wrapper):
    """Moving average of the parameters, for evaluation (Polyak and Juditsky 1992).

        e = e + weight * (p - e)                     after each step
        weight = (1 - decay) / (1 - decay^n)         n steps averaged so far, this one included

    This is the mean of all p, each weighted by decay to the power of its age: the moving average that begins
    at 0, divided by the sum of its weights. In this form an average of equal weights stays exactly where they
    are. It is float32 whatever the parameter's dtype. One pass reads p and e and writes e: 12 bytes a
    parameter in fp32, where AdamW's own step moves 28.

    Args:
        optimizer: one of danlu's or of torch's, or `Lookahead` around one.
        decay: decay rate of the average, in [0, 1).

    Each step of the optimizer updates the averages of all its parameters, with or without a gradient, except
    those that could not have one (of an integer dtype, say). `eval()` and `swap()` put the averages in place.
    A step between `eval()` and `train()` raises RuntimeError. Only parameters are averaged. Buffers, such as
    the statistics of batch norm, stay the model's own.

    The state_dict adds `ema` and its `ema_step` (n) for each parameter, and `ema_decay` for each group, to
    the optimizer's state. Loaded into an `EMA` of another decay, n becomes the number of steps with the same
    sum of weights, so the average continues as it should. Taken with the averages in place, the state_dict
    holds the weights for training as `raw`.

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
    evaluated = "the averages"
    training_key = "raw"

    def __init__(self, optimizer: torch.optim.Optimizer, decay: float = 0.999) -> None:
        self.check_order(optimizer)
        checks.unit_interval("decay", decay)
        super().__init__(optimizer, _Average(optimizer, decay=decay))

    @property
    def decay(self) -> float:
        return float(self._pass._hyper["decay"])

    def _step(self, closure: Callable[[], Any] | None) -> Any:
        self._pass.start()
        return self.step_inner(closure)

    def count_update(self) -> None:
        self._pass.run()
        super().count_update()

    @contextmanager
    def swap(self) -> Iterator[None]:
        """Puts the averages in the parameters' place, and the parameters back at the end.

        Holds a copy of the parameters meanwhile. After an evaluation under `fully_shard`, call the model's
        `reshard()` before and after this: its root module keeps the weights that it has gathered.

        Raises:
            RuntimeError: there is no average yet, or they are in place already.
        """
        lock = self._shared.lock
        with lock:
            if self._shared.training is not None:
                raise RuntimeError("EMA: the averages are in place already")
            averages = self.weights_for_evaluation()
            if not averages:
                raise RuntimeError("EMA: there is no average before the first step")
            self.put_in_place(averages)
        try:
            yield
        finally:
            with lock:
                self.put_back()

    def weights_for_evaluation(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return [(p, held["ema"]) for p, held in self._pass.state.items() if held["step"].item()]

    def marks(self) -> dict[str, Any]:
        return {"ema_decay": self.decay}

    def adapt(self, own: list[dict[str, Any]], saved: dict[str, Any]) -> dict[str, Any]:
        before = saved.get("ema_decay", self.decay)
        checks.unit_interval("ema_decay", before)
        if before != self.decay:
            for held in own:
                held["step"].fill_(_steps_of_equal_weight(held["step"].item(), before, self.decay))
        return self.marks()

    def settings(self) -> dict[str, Any]:
        return {"decay": self.decay}


# steps after which any decay has all the weight
MANY = 1e30


def _steps_of_equal_weight(steps: float, before: float, now: float) -> float:
    """After how many steps, a real number, averages of decay `now` have the sum of weights, 1 - decay^steps,
    that those of decay `before` have after `steps`.
    """
    if steps == 0 or now == 0:  # one step has all the weight
        return steps
    return MANY if before == 0 else steps * math.log(before) / math.log(now)


class _Average(ParameterPass):
    _rule = "average"
    state_names = ("ema",)
    takes_gradients = False
    outcome = "none"

    @staticmethod
    def coefficients(math: Any, *, step: Any, decay: float) -> dict[str, Any]:
        return dict(weight=(1 - decay) / (1 - math.pow(decay, step)))

    @staticmethod
    def reference(
        p: torch.Tensor, g: torch.Tensor, e: torch.Tensor, *, step: float, decay: float
    ) -> torch.Tensor:
        e.add_((p - e) * ((1 - decay) / (1 - decay**step)))
        return p
