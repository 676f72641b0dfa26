"""What multiplies every gradient of a step, and whether the step counts: GradScaler and clipping."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from . import scalar
from .fake import is_fake


@dataclass(frozen=True)
class StepScale:
    """What an executor is told: coefficients take up `factor`, kernels multiply gradients by `clip`."""

    factor: float = 1.0
    clip: torch.Tensor | None = None  # float32 on the executor's device; None for 1
    # float32 there, not 0 where the step must change nothing; None if nobody has looked, or the host has
    found_inf: torch.Tensor | None = None


@dataclass(frozen=True)
class Scaling:
    """What the scale of a step follows from, beside the gradients.

    A GradScaler leaves `grad_scale` and `found_inf` as attributes of the optimizer: None, or tensors of one
    element. max_norm: None without clipping.
    """

    grad_scale: Any
    found_inf: Any
    max_norm: float | None

    @classmethod
    def of(cls, optimizer: object, max_norm: float | None) -> Scaling:
        return cls(_number_of(optimizer, "grad_scale"), _number_of(optimizer, "found_inf"), max_norm)

    @property
    def on_device(self) -> bool:
        """Whether the host would have to wait for a device to read it."""
        return is_on_device(self.grad_scale) or is_on_device(self.found_inf)

    @property
    def clips(self) -> bool:
        return self.max_norm is not None

    def skips(self) -> bool:
        """Whether some gradient is not finite, and the step must change nothing."""
        return self.found_inf is not None and float(self.found_inf) != 0

    def factor(self, squares: Sequence[torch.Tensor | float]) -> float:
        """1 / grad_scale, times the factor that clips; squares: whose sum is that of all gradients."""
        factor = 1.0 if self.grad_scale is None else 1.0 / float(self.grad_scale)
        if self.max_norm is None:
            return factor
        excess = math.sqrt(sum(map(float, squares))) * factor / self.max_norm
        return factor / float(scalar.maximum(1.0, excess))

    def factor_on(self, device: torch.device, squares: Sequence[torch.Tensor | float]) -> torch.Tensor | None:
        """`factor` as a float32 tensor, with no synchronization; None for 1."""
        if self.grad_scale is None and self.max_norm is None:
            return None
        factor = torch.ones((), dtype=torch.float64, device=device)
        if self.grad_scale is not None:
            factor = factor / _scalar_on(device, self.grad_scale)
        if self.max_norm is not None:
            norm = _scalar_on(device, sum(_scalar_on(device, some) for some in squares)).sqrt()
            factor = factor / (norm * factor / self.max_norm).clamp(min=1.0)
        return factor.float()

    def grad_scale_on(self, device: torch.device) -> torch.Tensor | None:
        """float32; None for 1."""
        return None if self.grad_scale is None else _scalar_on(device, self.grad_scale, torch.float32)

    def found_inf_on(self, device: torch.device) -> torch.Tensor | None:
        """float32, not 0 where the step must change nothing; None if nobody has looked."""
        return None if self.found_inf is None else _scalar_on(device, self.found_inf, torch.float32)


def _number_of(optimizer: object, name: str) -> Any:
    """What a GradScaler has left; None also for a fake tensor, which has no number."""
    value = getattr(optimizer, name, None)
    return None if isinstance(value, torch.Tensor) and is_fake(value) else value


def is_on_device(value: object) -> bool:
    return isinstance(value, torch.Tensor) and not value.is_cpu


def _scalar_on(device: torch.device, value: object, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value.to(device=device, dtype=dtype).reshape(())
    return torch.full((), float(value), dtype=dtype, device=device)  # type: ignore[arg-type]
