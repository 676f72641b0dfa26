"""Gradient accumulation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .. import checks
from ..optimizer import FusedOptimizer
from .parameter_pass import ParameterPass, innermost
from .wrapper import Wrapper


class GradientAccumulation(Wrapper):
    """Makes one step of the optimizer on the mean of the gradients of `steps` calls.

        mean = (1 / steps) * g                       at the first call
        mean = mean + (1 / steps) * g                at each further one; at the last the optimizer steps

    A call costs one pass that reads the gradient and reads and writes the mean, 12 bytes a parameter in fp32,
    and touches nothing else. The mean is float32 whatever the gradient's dtype, and the gradient may be
    dropped right after the call. danlu's optimizers take the mean as it is; torch's, where the parameter is
    bfloat16 or float16, a copy of it in the parameter's dtype. `Tiger(accumulation_steps=...)` needs no mean.

    Args:
        optimizer: one of danlu's or of torch's, or another wrapper around one: accumulation is the outermost.
        steps: gradients to one step of the optimizer, at least 1.

    Attributes:
        stepped: whether the last call of `step()` or `flush()` made a step of the optimizer.

    A parameter without a gradient at a call adds nothing; one without any in `steps` calls has none when the
    optimizer steps. The state_dict holds `mean_grad` and the number of gradients in it for each parameter,
    beside the optimizer's state, so that a run resumed in the middle of a cycle goes on to the same bits.

    Raises:
        ValueError: steps is out of its range.
        TypeError: the optimizer cannot be wrapped.

    >>> p = torch.nn.Parameter(torch.tensor([1.0]))
    >>> opt = danlu.GradientAccumulation(torch.optim.SGD([p], lr=1.0), steps=2)
    >>> for g in (1.0, 2.0):
    ...     p.grad = torch.tensor([g])
    ...     opt.step()
    ...     print(opt.stepped, p.item())
    False 1.0
    True -0.5
    """

    rank = 4
    position_key = "accumulated_steps"
    _pass: _Mean

    def __init__(self, optimizer: torch.optim.Optimizer, steps: int) -> None:
        self.check_order(optimizer)
        checks.positive_int("steps", steps)
        super().__init__(optimizer, _Mean(optimizer, steps=steps))

    @property
    def steps(self) -> int:
        return int(self._pass._hyper["steps"])

    def flush(self) -> bool:
        """Makes the step for a group of less than `steps` gradients, on their mean; false if it has none.

        Call it at the end of an epoch whose last group is not full, or to repeat a step that raised.
        """
        self.stepped = False
        if self.position > 0:
            if self.position != self.steps:
                self._pass.scale(self.steps / self.position)
                self.position = self.steps
            self._step_optimizer()
        return self.stepped

    def _step(self, closure: Callable[[], Any] | None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.stepped = False
        self.refuse_capture()
        if self.position >= self.steps:
            raise RuntimeError("GradientAccumulation: the last step was not made; flush() repeats it")
        self._pass.step()
        self.position += 1
        if self.position == self.steps:
            self._step_optimizer()
        return loss

    def _step_optimizer(self) -> None:
        with self._pass.as_gradients():
            self.optimizer.step()
        self._pass.forget()
        self.position = 0
        self.stepped = True

    def check_position(self, position: Any) -> None:
        if not isinstance(position, int) or not 0 <= position <= self.steps:
            raise ValueError(
                f"{self.position_key} must be an integer from 0 to steps, {self.steps}, got {position!r}"
            )

    def settings(self) -> dict[str, Any]:
        return {"steps": self.steps}


class _Mean(ParameterPass):
    """`step` of a parameter counts the gradients in its mean."""

    _rule = "accumulate"
    state_names = ("mean_grad",)
    outcome = "none"

    def count(self, p: torch.Tensor) -> float:
        held = self.state.get(p)
        return held["step"].item() if held else 0.0

    def forget(self) -> None:
        """The next gradient of each parameter is the first of a new mean."""
        for held in self.state.values():
            held["step"].zero_()

    def scale(self, factor: float) -> None:
        with torch.no_grad():
            for held in self.state.values():
                held["mean_grad"].mul_(factor)

    @contextmanager
    def as_gradients(self) -> Iterator[None]:
        """Lets every parameter have its mean as gradient; what it had is back in the end."""
        takes_fp32 = isinstance(innermost(self._of), FusedOptimizer)
        kept: list[tuple[torch.Tensor, torch.Tensor | None, torch.dtype | None]] = []
        try:
            for p in self.parameters():
                dtype = getattr(p, "grad_dtype", p.dtype)
                kept.append((p, p.grad, dtype))
                p.grad = None
                if self.count(p) > 0:
                    mean = self.state[p]["mean_grad"]
                    if not takes_fp32:
                        mean = mean.to(p.dtype)
                    _set_gradient(p, mean, mean.dtype)
            yield
        finally:
            for p, grad, dtype in kept:
                _set_gradient(p, grad, dtype)

    @property
    def counters_on_device(self) -> bool:
        """Never: the host has to know which means there are."""
        return False

    @counters_on_device.setter
    def counters_on_device(self, value: bool) -> None:
        pass

    @staticmethod
    def coefficients(math: Any, *, step: Any, steps: int) -> dict[str, Any]:
        return dict(fresh=math.where(step == 1, 1.0, 0.0), weight=1 / steps)

    @staticmethod
    def reference(
        p: torch.Tensor, g: torch.Tensor, mean: torch.Tensor, *, step: float, steps: int
    ) -> torch.Tensor:
        term = g * (1 / steps)
        mean.copy_(term if step == 1 else mean + term)
        return p


def _set_gradient(p: torch.Tensor, g: torch.Tensor | None, dtype: torch.dtype | None) -> None:
    """dtype: what torch shall take as gradients of `p` from now on; None for any."""
    if dtype != getattr(p, "grad_dtype", dtype):
        p.grad = None
        p.grad_dtype = dtype
    p.grad = g
