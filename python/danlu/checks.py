"""Errors at the border: hyper-parameters when a group is made, tensors before a step writes anything."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any

import torch

from . import capture
from .fake import is_fake
from .sharding import local


def at_least_zero(name: str, value: Any) -> None:
    _number(name, value)
    if not (value >= 0 and math.isfinite(value)):
        raise ValueError(f"{name} must be finite and at least 0, got {value}")


def at_most_zero(name: str, value: Any) -> None:
    _number(name, value)
    if not (value <= 0 and math.isfinite(value)):
        raise ValueError(f"{name} must be finite and at most 0, got {value}")


def unit_interval(name: str, value: Any, *, zero: bool = True) -> None:
    """[0, 1), or (0, 1) without `zero`."""
    _number(name, value)
    if not (0 <= value < 1) or (value == 0 and not zero):
        raise ValueError(f"{name} must be in {'[' if zero else '('}0, 1), got {value}")


def share(name: str, value: Any) -> None:
    """(0, 1]."""
    _number(name, value)
    if not 0 < value <= 1:
        raise ValueError(f"{name} must be in (0, 1], got {value}")


def pair(name: str, value: Any) -> None:
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 2:
        raise ValueError(f"{name} must be two numbers, got {value!r}")


def betas(value: Any, *, zero2: bool = True) -> None:
    pair("betas", value)
    unit_interval("betas[0]", value[0])
    unit_interval("betas[1]", value[1], zero=zero2)


def positive_int(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")


def one_of(name: str, value: Any, allowed: Sequence[Any]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def learning_rate(value: Any) -> None:
    """A float or a tensor of one element; a tensor on a device is not read, which would synchronize."""
    if isinstance(value, torch.Tensor):
        # as torch says it, for who looks for that
        wrong = "Tensor lr must be 1-element: " if value.numel() != 1 else ""
        if wrong or value.is_complex():
            found = f"shape {tuple(value.shape)}" if wrong else value.dtype
            raise ValueError(f"{wrong}lr must be a number or a real tensor of one element, got {found}")
        if not value.is_cpu:
            return
        value = value.item()
    try:
        at_least_zero("lr", value)
    except ValueError as error:
        raise ValueError(f"Invalid learning rate: {error}") from None


def parameter(name: str, p: torch.Tensor) -> None:
    """Raises if `p` is no tensor that a step could update in place."""
    _real_dense(name, "parameter", p)
    if overlaps(p):
        raise ValueError(
            f"{name}: elements of the parameter share memory (shape {tuple(p.shape)}, strides {p.stride()}); "
            "an expanded tensor cannot be updated in place"
        )


def can_be_stepped(p: torch.Tensor) -> bool:
    """Whether a step could update `p`, had it a gradient: real floating point, with data of its own."""
    try:
        parameter("", local(p))
    except (TypeError, ValueError):
        return False
    return True


def is_uninitialized(p: torch.Tensor) -> bool:
    """Whether `p` gets its shape from a first forward pass, as those of `torch.nn.LazyLinear`."""
    return torch.nn.parameter.is_lazy(p)


def alike_fake(name: str, what: str, p: torch.Tensor, t: torch.Tensor) -> None:
    """Raises if one of the two is a fake tensor and the other has data."""
    if is_fake(p) != is_fake(t):
        kinds = ("real", "fake") if is_fake(t) else ("fake", "real")
        raise TypeError(f"{name}: the parameter is a {kinds[0]} tensor, the {what} a {kinds[1]} one")


def gradient(name: str, p: torch.Tensor, g: torch.Tensor) -> None:
    """Raises if `g` is no gradient for `p`."""
    if g.layout != torch.strided:
        raise TypeError(
            f"{name}: the gradient is sparse ({g.layout}); this optimizer needs dense gradients, "
            "danlu.Lazy is what takes sparse ones"
        )
    _real_dense(name, "gradient", g)
    if g.shape != p.shape:
        raise ValueError(
            f"{name}: the gradient has shape {tuple(g.shape)}, the parameter has {tuple(p.shape)}"
        )
    if g.device != p.device:
        raise ValueError(f"{name}: the gradient is on {g.device}, the parameter is on {p.device}")


def listed_rows(name: str, p: torch.Tensor, g: torch.Tensor) -> None:
    """Raises if `g`, which is not strided, does not list rows of a gradient of `p`; looks at no number."""
    if g.layout != torch.sparse_coo:
        raise TypeError(
            f"{name}: the gradient has layout {g.layout}; danlu.Lazy takes torch.sparse_coo and dense ones"
        )
    if g.shape != p.shape:
        raise ValueError(
            f"{name}: the gradient has shape {tuple(g.shape)}, the parameter has {tuple(p.shape)}"
        )
    if g.device != p.device:
        raise ValueError(f"{name}: the gradient is on {g.device}, the parameter is on {p.device}")
    if g.sparse_dim() != 1:
        raise TypeError(
            f"{name}: the gradient is sparse in {g.sparse_dim()} dimensions; danlu.Lazy takes lists of whole "
            "rows, sparse in the first dimension alone"
        )
    _real_dense(name, "gradient", g._values())


def row_numbers(name: str, p: torch.Tensor, rows: torch.Tensor) -> None:
    """Raises if a gradient lists a row that `p` does not have; waits for the device of `rows`."""
    if rows.numel() == 0:
        return
    waits_for_rows(name, rows.device)
    first, last = (int(row) for row in rows.aminmax())
    if first < 0 or last >= p.shape[0]:
        wrong = first if first < 0 else last
        raise ValueError(f"{name}: the gradient lists row {wrong}, the parameter has {p.shape[0]} rows")


def waits_for_rows(name: str, device: torch.device) -> None:
    """Raises where a step cannot wait for the device."""
    if capture.is_capturing(device):
        raise RuntimeError(f"{name}: a lazy step waits for its rows, which no graph can capture")


def has_rows(name: str, p: torch.Tensor) -> None:
    """Raises if `p` cannot be stepped row by row."""
    if p.ndim == 0:
        raise ValueError(f"{name}: danlu.Lazy steps rows, a parameter of 0 dimensions has none")


def state(
    name: str,
    key: str,
    p: torch.Tensor,
    shape: tuple[int, ...],
    value: Any,
    dtype: torch.dtype | None = None,
) -> None:
    """Raises if `value` cannot be the state `key` of `p`, which has that shape and dtype; None: any that
    torch computes in.
    """
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: state {key!r} must be a tensor, got {type(value).__name__}")
    if value.shape != shape or value.device != p.device:
        wanted = f"the parameter has {shape}"
        if shape != p.shape:
            wanted = f"a parameter of {tuple(p.shape)} needs {shape}"
        raise ValueError(
            f"{name}: state {key!r} has shape {tuple(value.shape)} on {value.device}, {wanted} on {p.device}"
        )
    if dtype is not None and value.dtype != dtype:
        raise TypeError(f"{name}: state {key!r} has dtype {value.dtype}, its format needs {dtype}")
    _dense(name, f"state {key!r}", value)
    if dtype is None:
        _real(name, f"state {key!r}", value)
    if overlaps(value):
        raise ValueError(f"{name}: elements of state {key!r} share memory (strides {value.stride()})")


def counter(name: str, key: str, value: Any) -> None:
    if not isinstance(value, torch.Tensor) or value.numel() != 1 or value.dtype != torch.float32:
        found = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)
        raise TypeError(f"{name}: state {key!r} must be a float32 tensor of one element, got {found}")


def overlaps(t: torch.Tensor) -> bool:
    """Whether two elements of a strided tensor may lie at one address."""
    reach = 1
    for size, stride in _by_stride(t):
        if stride < reach:
            return True
        reach += (size - 1) * stride
    return False


def is_dense(t: torch.Tensor) -> bool:
    """Whether the elements fill their storage without gaps or overlaps, in any order of strides."""
    expected = 1
    for size, stride in _by_stride(t):
        if stride != expected:
            return False
        expected *= size
    return True


def _by_stride(t: torch.Tensor) -> list[tuple[int, int]]:
    if t.numel() == 0:
        return []
    dims = [(size, stride) for size, stride in zip(t.shape, t.stride(), strict=True) if size > 1]
    return sorted(dims, key=lambda dim: dim[1])


def _real_dense(name: str, what: str, t: torch.Tensor) -> None:
    _dense(name, what, t)
    _real(name, what, t)
    if t.is_meta:
        raise ValueError(f"{name}: the {what} is on the meta device and has no data")


def _real(name: str, what: str, t: torch.Tensor) -> None:
    if not t.is_floating_point():
        raise TypeError(f"{name}: the {what} has dtype {t.dtype}; a real floating-point tensor is needed")


def _dense(name: str, what: str, t: torch.Tensor) -> None:
    if is_uninitialized(t):
        raise ValueError(f"{name}: the {what} has no shape before the module's first forward pass")
    if t.is_quantized:
        raise TypeError(f"{name}: the {what} is quantized ({t.dtype}); a floating-point tensor is needed")
    if t.layout != torch.strided:
        raise TypeError(f"{name}: the {what} has layout {t.layout}; a strided tensor is needed")


def _number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ValueError(f"{name} must be a number, got {value!r}")
