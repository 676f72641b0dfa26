"""What references are written with where torch's own function differs in the last bit or at NaN."""

from __future__ import annotations

import torch


def sign(x: torch.Tensor) -> torch.Tensor:
    """1, -1, +0 at either zero, and NaN for NaN, where `torch.sign` gives 0."""
    one = torch.ones_like(x)
    zero = torch.zeros_like(x)
    return torch.where(x > 0, one, torch.where(x < 0, -one, torch.where(x == x, zero, x)))


def sqrt(x: torch.Tensor) -> torch.Tensor:
    """The correctly rounded root; on a CPU fp32 `torch.sqrt` is off by one ulp in a sixth of all inputs."""
    return x.double().sqrt().to(x.dtype)
