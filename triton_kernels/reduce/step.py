"""The last pass: new parameters and element-wise states."""

from __future__ import annotations

import triton
import triton.language as tl

from ..engine import coefficients_of
from ..storage import load, store
from .elements import arrays_of, ends_of, states_of
from .job import CHUNK, FACTORS, FIELDS, NUMBERS, SIZE, entry, floats, row_of
from .stand_ins import stand_ins_at


@triton.jit(do_not_specialize=NUMBERS)
def step(
    table,
    geometries,
    places,
    scratch,
    rows,
    clip,
    found_inf,
    tensors,
    row_stride,
    entries,
    first,
    count,
    reverse,
    STEP: tl.constexpr,
    DTYPES: tl.constexpr,
    COEFFICIENTS: tl.constexpr,
    FACTOR_COUNT: tl.constexpr,
    ALONG: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """New parameters and elementwise states."""
    tensor, index = entry(places, entries, first, count, reverse)
    row, idle = row_of(table, tensor, rows, found_inf, tensors, row_stride, DTYPES)
    if idle:
        return
    factor = tl.load(row) * tl.load(clip)
    store_params = tl.load(row + 1) != 0
    coefficients = coefficients_of(row, COEFFICIENTS)
    geometry = geometries + tensor * FIELDS
    factors = ()
    for i in tl.static_range(FACTOR_COUNT):
        factors = factors + (tl.load(floats(scratch, geometry, FACTORS) + i),)
    start = index.to(tl.int64) * CHUNK
    left = tl.minimum(tl.load(geometry + SIZE) - start, CHUNK).to(tl.int32)
    arrays, aligned, bits = arrays_of(table, tensor, tensors, start, DTYPES, ALONG)
    ends = ends_of(bits, left, geometry, ALONG, BLOCK)
    stand_ins = stand_ins_at(geometry, scratch, start, ALONG)
    stepped(arrays, aligned, ends, stand_ins, factor, store_params, coefficients, factors, STEP, ALONG, BLOCK)


@triton.jit
def stepped(
    arrays,
    aligned,
    ends,
    stand_ins,
    factor,
    store_params,
    coefficients,
    factors,
    STEP: tl.constexpr,
    ALONG: tl.constexpr,
    BLOCK: tl.constexpr,
):
    even, full, left = ends
    numbers = (factor, store_params, coefficients, factors)
    if ALONG != "none":
        for at in range(0, even, BLOCK):
            offsets = at + tl.arange(0, BLOCK)
            _update(aligned, offsets, None, stand_ins, numbers, STEP, ALONG, True)
    for at in range(even, full, BLOCK):
        offsets = at + tl.arange(0, BLOCK)
        _update(aligned, offsets, None, stand_ins, numbers, STEP, ALONG, False)
    for at in range(full, left, BLOCK):
        offsets = at + tl.arange(0, BLOCK)
        _update(arrays, offsets, offsets < left, stand_ins, numbers, STEP, ALONG, False)


@triton.jit
def _update(
    arrays,
    offsets,
    mask,
    stand_ins,
    numbers,
    STEP: tl.constexpr,
    ALONG: tl.constexpr,
    EVEN: tl.constexpr,
):
    factor, store_params, coefficients, factors = numbers
    p = load(arrays[0] + offsets, mask)
    g = load(arrays[1] + offsets, mask) * factor
    states = states_of(arrays, stand_ins, offsets, mask, ALONG, EVEN)
    if len(factors):
        amount, states = STEP(p, g, states, coefficients, factors)
    else:
        amount, states = STEP(p, g, states, coefficients)
    if store_params:
        store(arrays[0] + offsets, p - amount, mask)
    for i in tl.static_range(len(arrays) - 2):
        store(arrays[2 + i] + offsets, states[len(states) - (len(arrays) - 2) + i], mask)
