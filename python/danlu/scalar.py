"""The arithmetic that `coefficients` may use besides + - * /: on Python floats and on float64 tensors alike.

The same text then folds hyper-parameters on the host, and on the device where the host cannot know them.
"""

from __future__ import annotations

import math
from typing import TypeAlias

import torch

Scalar: TypeAlias = float | torch.Tensor

inf = math.inf


def sqrt(x: Scalar) -> Scalar:
    return torch.sqrt(x) if isinstance(x, torch.Tensor) else math.sqrt(x)


def log1p(x: Scalar) -> Scalar:
    return torch.log1p(x) if isinstance(x, torch.Tensor) else math.log1p(x)


def expm1(x: Scalar) -> Scalar:
    """exp(x) - 1; infinite where it overflows, as on a device (`math.expm1` raises)."""
    if isinstance(x, torch.Tensor):
        return torch.expm1(x)
    try:
        return math.expm1(x)
    except OverflowError:
        return math.inf


def pow(base: Scalar, exponent: Scalar) -> Scalar:  # noqa: A001
    return base**exponent


def maximum(a: Scalar, b: Scalar) -> Scalar:
    """The larger of the two; NaN if either is NaN."""
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        return torch.maximum(*_tensors(a, b))
    return a if a > b or a != a else b


def minimum(a: Scalar, b: Scalar) -> Scalar:
    """The smaller of the two; NaN if either is NaN."""
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        return torch.minimum(*_tensors(a, b))
    return a if a < b or a != a else b


def where(condition: bool | torch.Tensor, a: Scalar, b: Scalar) -> Scalar:
    if isinstance(condition, torch.Tensor):
        return torch.where(condition, *_tensors(a, b, condition.device))
    return a if condition else b


def _tensors(a: Scalar, b: Scalar, device: torch.device | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    for x in (a, b):
        if isinstance(x, torch.Tensor):
            device = x.device
    return (
        _tensor(a, device),
        _tensor(b, device),
    )


def _tensor(x: Scalar, device: torch.device | None) -> torch.Tensor:
    if isinstance(x, torch.Tensor):
        return x.to(torch.float64)
    return torch.full(
        (), x, dtype=torch.float64, device=device
    )  # a captured graph takes no copy from the host
