"""What multiplies every gradient of a step, and whether the step counts: GradScaler and clipping."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from . import scalar
from .fake import is_fake

if TYPE_CHECKING:
    from .backends import Part
    from .optimizer import FusedOptimizer


class GradientScale:
    """The scaling of one step, for backends that want numbers and for those that want tensors on a device.

    A GradScaler leaves `grad_scale` and `found_inf` as attributes of the optimizer: None, or tensors of one
    element.
    """

    def __init__(self, optimizer: FusedOptimizer) -> None:
        self._optimizer = optimizer
        self._grad_scale = _number_of(optimizer, "grad_scale")
        self._found_inf = _number_of(optimizer, "found_inf")
        self._factor: float | None = None
        self.parts: Sequence[Part] = ()  # of the plan, which sets them when they have read the gradients

    @property
    def on_device(self) -> bool:
        """Whether the host would have to wait for a device to read it."""
        return is_on_device(self._grad_scale) or is_on_device(self._found_inf)

    @property
    def clips(self) -> bool:
        return self._optimizer._max_grad_norm is not None

    @property
    def unscaled(self) -> bool:
        """Whether the factor is 1."""
        return self._grad_scale is None and not self.clips

    def skips(self) -> bool:
        """Whether some gradient is not finite, and the step must change nothing."""
        return self._found_inf is not None and float(self._found_inf) != 0

    def factor(self) -> float:
        """1 / grad_scale, times the factor that clips."""
        if self._factor is None:
            self._factor = 1.0 if self._grad_scale is None else 1.0 / float(self._grad_scale)
            if self.clips:
                squares = sum(float(part) for part in self._squares)
                excess = math.sqrt(squares) * self._factor / self._max_norm
                self._factor = self._factor / float(scalar.maximum(1.0, excess))
        return self._factor

    def factor_on(self, device: torch.device) -> torch.Tensor:
        """`factor` as a float32 tensor, with no synchronization."""
        factor = torch.ones((), dtype=torch.float64, device=device)
        if self._grad_scale is not None:
            factor = factor / _scalar_on(device, self._grad_scale)
        if self.clips:
            squares = sum(_scalar_on(device, part) for part in self._squares)
            factor = factor / (_scalar_on(device, squares).sqrt() * factor / self._max_norm).clamp(min=1.0)
        return factor.float()

    def grad_scale_on(self, device: torch.device) -> torch.Tensor | None:
        """float32; None for 1."""
        return None if self._grad_scale is None else _scalar_on(device, self._grad_scale, torch.float32)

    def found_inf_on(self, device: torch.device) -> torch.Tensor | None:
        """float32, not 0 where the step must change nothing; None if nobody has looked."""
        return None if self._found_inf is None else _scalar_on(device, self._found_inf, torch.float32)

    @functools.cached_property
    def _squares(self) -> list[torch.Tensor | float]:
        """Of each part, read once a step."""
        return [part.gradient_squares() for part in self.parts]

    @property
    def _max_norm(self) -> float:
        assert self._optimizer._max_grad_norm is not None
        return self._optimizer._max_grad_norm


def _number_of(optimizer: FusedOptimizer, name: str) -> Any:
    """What a GradScaler has left; None also for a fake tensor, which has no number."""
    value = getattr(optimizer, name, None)
    return None if isinstance(value, torch.Tensor) and is_fake(value) else value


def is_on_device(value: object) -> bool:
    return isinstance(value, torch.Tensor) and not value.is_cpu


def _scalar_on(device: torch.device, value: object, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value.to(device=device, dtype=dtype).reshape(())
    return torch.full((), float(value), dtype=dtype, device=device)  # type: ignore[arg-type]
