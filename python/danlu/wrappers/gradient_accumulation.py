"""Gradient accumulation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .. import checks
from ..optimizer import FusedOptimizer
from ..sharding import is_sharded
from .parameter_pass import ParameterPass, innermost
from .wrapper import Wrapper


class GradientAccumulation(Wrapper):
    """Makes one step of the optimizer on the mean of the gradients of `steps` calls.

        mean = (1 / steps) * g                       at the first call
        mean = mean + (1 / steps) * g                at each further one; at the last the optimizer steps

    A call costs one pass. It reads the gradient, reads and writes the mean, 12 bytes a parameter in fp32, and
    touches nothing else. The mean is float32 whatever the gradient's dtype. You may drop the gradient right
    after the call. danlu's optimizers take the mean as it is. torch's take a copy in the parameter's dtype if
    the parameter is bfloat16 or float16. `Tiger(accumulation_steps=...)` needs no mean.

    Args:
        optimizer: one of danlu's or of torch's, or another wrapper around one: accumulation is the outermost.
        steps: gradients for one step of the optimizer, at least 1.

    Attributes:
        stepped: whether the last call of `step()` or `flush()` made a step of the optimizer.

    A parameter without a gradient at a call adds nothing. One without any in `steps` calls has none when the
    optimizer steps. The state_dict adds `mean_grad` and the number of gradients in it, for each parameter, to
    the optimizer's state. So a run resumed between two updates continues to the same bits. It may resume with
    other `steps`: each gradient taken counts towards the new number. If that is reached already, `flush()`
    makes the step.

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

    def __init__(self, optimizer: torch.optim.Optimizer, steps: int) -> None:
        self.check_order(optimizer)
        checks.positive_int("steps", steps)
        super().__init__(optimizer, _Mean(optimizer, steps=steps))

    @property
    def steps(self) -> int:
        return int(self._pass._hyper["steps"])

    def flush(self) -> bool:
        """Makes the step for fewer than `steps` gradients, on their mean; false if there are none.

        Call it at the end of an epoch whose last group is incomplete, or to repeat a step that raised.
        """
        with self._shared.lock:
            self.stepped = False
            self.refuse_in_evaluation()
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
        self.refuse_capture()
        if self.position >= self.steps:
            raise RuntimeError("GradientAccumulation: the last step was not made; flush() repeats it")
        self._pass.run()
        self.position += 1
        if self.position == self.steps:
            self._step_optimizer()
        return loss

    def _step_optimizer(self) -> None:
        with self._pass.as_gradients():
            self.step_inner()

    def count_update(self) -> None:
        self._pass.forget()
        self.position = 0
        super().count_update()

    def marks(self) -> dict[str, Any]:
        return {**super().marks(), "accumulated_of": self.steps}

    def adapt(self, own: list[dict[str, Any]], saved: dict[str, Any]) -> dict[str, Any]:
        steps = saved.get("accumulated_of", self.steps)
        position = saved.get(self.position_key, 0)
        checks.positive_int("accumulated_of", steps)
        if isinstance(position, bool) or not isinstance(position, int) or not 0 <= position <= steps:
            raise ValueError(
                f"{self.position_key} must be an integer from 0 to {steps} (accumulated_of), got {position!r}"
            )
        if position and steps != self.steps:
            for held in own:
                held["mean_grad"] = held["mean_grad"] * (steps / max(self.steps, position))
        return {**self.marks(), self.position_key: min(position, self.steps)}

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
        for held in self._held():
            held["step"].zero_()

    def scale(self, factor: float) -> None:
        with torch.no_grad():
            for held in self._held():
                held["mean_grad"].mul_(factor)

    def _held(self) -> list[dict[str, Any]]:
        """The states of the parameters that take part: frameworks may step one group after the other."""
        return [self.state[p] for p in self.parameters() if p in self.state]

    @contextmanager
    def as_gradients(self) -> Iterator[None]:
        """Lets every parameter have its mean as gradient; what it had is back in the end."""
        takes_fp32 = isinstance(innermost(self._of), FusedOptimizer)
        kept: list[tuple[torch.Tensor, torch.Tensor | None]] = []
        try:
            for p in self.parameters():
                kept.append((p, p.grad))
                p.grad = None
                if self.count(p) > 0:
                    mean = self.state[p]["mean_grad"]
                    _give_gradient(p, mean if takes_fp32 else mean.to(p.dtype))
            yield
        finally:
            for p, grad in kept:
                p.grad = None
                p.grad = grad

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


def _give_gradient(p: torch.Tensor, g: torch.Tensor) -> None:
    """Also one of another dtype, which torch refuses, without a word in `p.grad_dtype`: once set, that would
    stay when the parameter's dtype changes.
    """
    accepted = getattr(p, "grad_dtype", p.dtype)
    if accepted in (g.dtype, None):
        p.grad = g
    elif is_sharded(p):
        p.grad_dtype = None  # a DTensor's data cannot be replaced
        p.grad = g
    else:
        p.grad = torch.zeros((), dtype=accepted, device=p.device).expand(p.shape)
        p.grad.data = g
