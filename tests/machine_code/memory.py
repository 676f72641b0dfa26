"""This process's memory as that of a GPU: kernels reach live tensors in it, and nothing else."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch

RAW = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


class Fault(Exception):
    """What a GPU would stop at, or what no kernel may do."""


class Memory:
    """Extents, (first byte, byte behind the last), that may be read and written."""

    def __init__(self, extents: Iterable[tuple[int, int]]) -> None:
        merged: list[tuple[int, int]] = []
        for first, end in sorted(extents):
            if merged and first < merged[-1][1]:  # neighbours that merely touch stay apart
                merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
            elif end > first:
                merged.append((first, end))
        self._first, self._end = np.array([(0, 0), *merged], np.uint64).T.copy()

    @classmethod
    def of_tensors(cls) -> Memory:
        """Of those that live now and were made within `recent_tensors`, or ever without it."""
        return cls(_extents(_tensors()))

    def load(self, addresses: np.ndarray, itemsize: int, count: int = 1) -> list[np.ndarray]:
        """From uint64 addresses `count` neighbouring values each, as raw bits."""
        first = self._checked(addresses, itemsize, count)
        return [_SPACE[itemsize][first + i] for i in range(count)]

    def store(self, addresses: np.ndarray, itemsize: int, values: list[np.ndarray]) -> None:
        first = self._checked(addresses, itemsize, len(values))
        for i, value in enumerate(values):
            _SPACE[itemsize][first + i] = value

    def _checked(self, addresses: np.ndarray, itemsize: int, count: int) -> np.ndarray:
        size = np.uint64(itemsize * count)
        if (bad := addresses & (size - np.uint64(1)) != 0).any():
            raise Fault(f"misaligned access of {size} bytes at {_shown(addresses[bad])}")
        extent = np.searchsorted(self._first, addresses, side="right") - 1
        if (bad := addresses + size > self._end[extent]).any():
            raise Fault(f"access of {size} bytes at {_shown(addresses[bad])}: {self._near(addresses[bad][0])}")
        return ((addresses - np.uint64(_BASE)) // np.uint64(itemsize)).astype(np.intp)

    def _near(self, address: np.uint64) -> str:
        i = int(np.searchsorted(self._first, address, side="right")) - 1
        if i < 1:
            return "no tensor lies there"
        first, end = int(self._first[i]), int(self._end[i])
        return f"{int(address) - end:+d} bytes from the end of a tensor of {end - first}"


@contextmanager
def recent_tensors() -> Iterator[None]:
    """Only tensors made within it count, which makes them quick to find."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _tensors() -> Iterator[torch.Tensor]:
    for found in gc.get_objects():
        if issubclass(type(found), torch.Tensor) and found.device.type == "cpu":
            yield found
            if found.is_leaf and found.grad is not None:  # perhaps without a Python object
                yield found.grad


def _extents(tensors: Iterable[torch.Tensor]) -> Iterator[tuple[int, int]]:
    for x in tensors:
        if x.layout == torch.strided and x.numel() and (first := x.data_ptr()):
            last = sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
            yield first, first + (last + 1) * x.element_size()


class _AddressSpace:
    """All of it as one array, of which only what was checked is touched."""

    def __init__(self, itemsize: int) -> None:
        kind = np.dtype(RAW[itemsize]).str
        self.__array_interface__ = {
            "version": 3,
            "typestr": kind,
            "shape": ((1 << 47) // itemsize,),
            "data": (_BASE, False),
        }


_BASE = 1 << 12  # no address of the first page is a tensor's
_SPACE = {itemsize: np.asarray(_AddressSpace(itemsize)) for itemsize in RAW}


def _shown(addresses: np.ndarray) -> str:
    more = f" and {len(addresses) - 1} more" if len(addresses) > 1 else ""
    return f"{int(addresses[0]):#x}{more}"
