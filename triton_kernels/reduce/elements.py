"""Elements of a tensor on their way between memory and registers."""

from __future__ import annotations

import triton
import triton.language as tl

from ..storage import load
from .factors import EIGHT, reduced_states
from .work_item import COLUMNS


@triton.jit
def arrays_of(table, tensor, tensors, start, DTYPES: tl.constexpr, ALONG: tl.constexpr):
    """Pointers to parameter, gradient and elementwise states, the same again for wide accesses, and bits that
    say whether these are allowed.
    """
    arrays = ()
    aligned = ()
    bits = start * 0
    for i in tl.static_range(len(DTYPES)):
        if i < 2 or ALONG == "none" or i >= 4:
            address = tl.load(table + i * tensors + tensor)
            array = address.to(tl.pointer_type(DTYPES[i])) + start
            bits = bits | array.to(tl.int64)
            arrays = arrays + (array,)
            aligned = aligned + (tl.multiple_of(array, 16),)
    return arrays, aligned, bits


@triton.jit
def ends_of(bits, left, geometry, ALONG: tl.constexpr, BLOCK: tl.constexpr):
    """Of a chunk's loops: wide accesses to all arrays, the columns' too; to all but these; with a mask."""
    full = tl.where(bits % 16 == 0, left // BLOCK * BLOCK, 0)
    even = full * 0
    if ALONG != "none":
        even = tl.where(tl.load(geometry + COLUMNS) % EIGHT == 0, full, 0)
    return even, full, left


@triton.jit
def states_of(arrays, factors, offsets, mask, ALONG: tl.constexpr, EVEN: tl.constexpr):
    """A rule's states: what stands in the place of the reduced ones, then the elementwise ones."""
    states = reduced_states(factors, offsets, mask, ALONG, EVEN)
    for i in tl.static_range(len(arrays) - 2):
        states = states + (load(arrays[2 + i] + offsets, mask),)
    return states
