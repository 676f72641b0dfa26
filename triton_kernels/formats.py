"""Storage formats: how the numbers of a tensor lie in its arrays, as danlu.formats has them."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .storage import load, store


class Format(NamedTuple):
    """What kernels are compiled for, with one for parameter, gradient and each state."""

    types: tuple[Any, ...]  # of the elements of its arrays
    load: Any  # (pointers, offsets, mask, first) -> fp32
    store: Any  # (pointers, offsets, values, mask, first)
    indexed: bool = False  # whether these look at `first`: the place in the tensor where the pointers point


@triton.jit
def load_number(pointers, offsets, mask, first):
    return load(pointers[0] + offsets, mask)


@triton.jit
def store_number(pointers, offsets, values, mask, first):
    store(pointers[0] + offsets, values, mask)


def _of_torch(kind: Any) -> Format:
    return Format((kind,), load_number, store_number)


FORMATS = {
    "float32": _of_torch(tl.float32),
    "bfloat16": _of_torch(tl.bfloat16),
    "float16": _of_torch(tl.float16),
}


@triton.jit
def arrays_of(table, tensor, tensors, start, first, FORMATS: tl.constexpr, SKIPPED: tl.constexpr):
    """Pointers to all arrays of a tensor from element `start` on, which is at `first`; the same again for
    wide accesses; and bits that say whether these are allowed. SKIPPED: so many states are left out.
    """
    values = ()
    wide_values = ()
    bits = start * 0
    further = len(FORMATS) + 1
    for i in tl.static_range(len(FORMATS)):
        pointers = ()
        wide = ()
        for j in tl.static_range(len(FORMATS[i][0])):
            if i < 2 or i >= 2 + SKIPPED:
                row = i if j == 0 else further + j - 1
                address = tl.load(table + row * tensors + tensor)
                pointer = address.to(tl.pointer_type(FORMATS[i][0][j])) + start
                bits = bits | pointer.to(tl.int64)
                pointers = pointers + (pointer,)
                wide = wide + (tl.multiple_of(pointer, 16),)
        values = values + (pointers,)
        wide_values = wide_values + (wide,)
        further = further + len(FORMATS[i][0]) - 1
    return (first, values), (first, wide_values), bits


@triton.jit
def load_value(arrays, offsets, mask, VALUE: tl.constexpr, FORMATS: tl.constexpr):
    """Of parameter, gradient or a state, in fp32; without a mask the accesses are 16 bytes wide."""
    first, values = arrays
    return FORMATS[VALUE][1](values[VALUE], offsets, mask, first)


@triton.jit
def store_value(arrays, offsets, numbers, mask, VALUE: tl.constexpr, FORMATS: tl.constexpr):
    first, values = arrays
    FORMATS[VALUE][2](values[VALUE], offsets, numbers, mask, first)


@triton.jit
def first_of(table, tensor, tensors, start, FORMATS: tl.constexpr):
    """The place of element `start` of what may be a part of a tensor; read only if a format asks."""
    first = start
    rows = len(FORMATS) + 1
    indexed = False
    for i in tl.static_range(len(FORMATS)):
        rows = rows + len(FORMATS[i][0]) - 1
        indexed = indexed or FORMATS[i][3]
    if indexed:
        first = start + tl.load(table + rows * tensors + tensor)
    return first
