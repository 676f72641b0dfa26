"""How numbers are kept in tensors: the one table of storage formats. csrc/common/formats.h and
triton_kernels/formats.py have the same formats for their kernels.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Array:
    """One of the tensors of a format: its dtype, and what follows a state's name in its key."""

    dtype: torch.dtype
    suffix: str = ""


@dataclass(frozen=True)
class Format:
    """Numbers in tensors of their shape, one for each array. This class is that of one array of a floating
    dtype; others say how they load and store.

    indexed: whether that depends on where a number is in its parameter. In a parameter's format all bits zero
    must be 0.
    """

    name: str
    arrays: tuple[Array, ...]
    indexed: bool = False

    def keys(self, state: str) -> tuple[str, ...]:
        """Of the tensors that keep a state, in a state_dict."""
        return tuple(state + array.suffix for array in self.arrays)

    def keys_of_parameter(self) -> tuple[str, ...]:
        """Of the tensors that keep a parameter beside itself, which is the first."""
        return tuple(array.suffix.lstrip("_") for array in self.arrays[1:])

    @property
    def is_torch(self) -> bool:
        """Whether it is that of one tensor which torch can compute with."""
        return len(self.arrays) == 1 and not self.indexed and self.arrays[0].dtype.is_floating_point

    def load(self, tensors: Sequence[torch.Tensor], index: torch.Tensor | None = None) -> torch.Tensor:
        """The numbers; of a format that is not torch's in float32.

        index: int64 places of the elements in the parameter, as torch counts them, where `indexed`.
        """
        (tensor,) = tensors
        return tensor

    def store(
        self, numbers: torch.Tensor, tensors: Sequence[torch.Tensor], index: torch.Tensor | None = None
    ) -> None:
        """Writes numbers into the tensors, rounded as the format says."""
        (tensor,) = tensors
        if tensor is not numbers:
            tensor.copy_(numbers)


# what torch computes in: parameters, gradients, and the first moment by `state_dtype`
TORCH = tuple(
    Format(str(dtype).removeprefix("torch."), (Array(dtype),))
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
)
FORMATS = {found.name: found for found in TORCH}


@functools.cache
def plain(dtype: torch.dtype) -> Format:
    """The format of a tensor of some floating dtype; kernels have those of `FORMATS`."""
    name = str(dtype).removeprefix("torch.")
    return FORMATS.get(name) or Format(name, (Array(dtype),))


def named(name: str) -> Format:
    return FORMATS.get(name) or plain(getattr(torch, name))


def found(state: str, held: Mapping[str, object]) -> Format | None:
    """The format of a state in a state_dict, by its keys and dtypes; None if it is not there."""
    kept = [f for f in FORMATS.values() if not f.is_torch and _fits(f, state, held)]
    if kept:
        return max(kept, key=lambda f: len(f.arrays))
    first = held.get(state)
    return plain(first.dtype) if isinstance(first, torch.Tensor) and first.is_floating_point() else None


def _fits(kept_as: Format, state: str, held: Mapping[str, object]) -> bool:
    tensors = [held.get(key) for key in kept_as.keys(state)]
    return all(
        isinstance(t, torch.Tensor) and t.dtype == array.dtype
        for t, array in zip(tensors, kept_as.arrays, strict=True)
    )


def widest(names: Sequence[str]) -> int:
    """Bytes of the widest element of any array."""
    return max(array.dtype.itemsize for name in names for array in named(name).arrays)


def table_rows(names: Sequence[str]) -> int:
    """How many rows a table of addresses has for tensors of these formats (parameter, gradient, states):
    first arrays, index of coefficients, further arrays, place of the first element.
    """
    return sum(len(named(name).arrays) for name in names) + 2
