"""Elements of a tensor on their way between memory and registers."""

from __future__ import annotations

import triton
import triton.language as tl

from ..formats import arrays_of, load_value
from .factors import EIGHT, reduced_states
from .work_item import COLUMNS


@triton.jit
def chunk_of(table, tensor, tensors, start, FORMATS: tl.constexpr, ALONG: tl.constexpr):
    """As arrays_of(), without states that are reduced."""
    if ALONG == "none":
        arrays, aligned, bits = arrays_of(table, tensor, tensors, start, start, FORMATS, 0)
    else:
        arrays, aligned, bits = arrays_of(table, tensor, tensors, start, start, FORMATS, 2)
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
def states_of(arrays, factors, offsets, mask, FORMATS: tl.constexpr, ALONG: tl.constexpr, EVEN: tl.constexpr):
    """A rule's states: what stands in the place of the reduced ones, then the elementwise ones."""
    states = reduced_states(factors, offsets, mask, ALONG, EVEN)
    for i in tl.static_range(2, len(FORMATS)):
        if ALONG == "none" or i >= 4:
            states = states + (load_value(arrays, offsets, mask, i, FORMATS),)
    return states
