"""This process's memory as that of a GPU: kernels reach live tensors in it, and nothing else."""

from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Iterable, Iterator

import numpy as np
import torch

RAW = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


class Fault(Exception):  # noqa: N818
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
            raise Fault(
                f"access of {size} bytes at {_shown(addresses[bad])}: {self._near(addresses[bad][0])}"
            )
        return ((addresses - np.uint64(_BASE)) // np.uint64(itemsize)).astype(np.intp)

    def _near(self, address: np.uint64) -> str:
        i = int(np.searchsorted(self._first, address, side="right")) - 1
        if i < 1:
            return "no tensor lies there"
        first, end = int(self._first[i]), int(self._end[i])
        return f"{int(address) - end:+d} bytes from the end of a tensor of {end - first}"


class RecentTensors:
    """The tensors on the CPU that live and were made within this context, bases of views among them."""

    def __enter__(self) -> RecentTensors:
        gc.freeze()
        self._known: list[weakref.ref[torch.Tensor]] = []
        return self

    def __exit__(self, *error: object) -> None:
        gc.unfreeze()

    def memory(self) -> Memory:
        """What kernels may touch now."""
        objects = gc.get_objects()  # without those that are frozen
        kinds = {kind for kind in set(map(type, objects)) if issubclass(kind, torch.Tensor)}
        found = itertools.compress(objects, map(kinds.__contains__, map(type, objects)))
        self._known = [known for known in self._known if known() is not None]
        self._known += [weakref.ref(x) for x in found if x.device.type == "cpu"]
        gc.freeze()  # so that the next search is quick, too
        live = [x for known in self._known if (x := known()) is not None]
        # a gradient may have no Python object
        live += [x.grad for x in live if x.is_leaf and x.grad is not None]
        return Memory(_extents(live))


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
