"""The last pass: new parameters and element-wise states."""

from __future__ import annotations

import triton
import triton.language as tl

from ..engine import coefficients_of
from ..formats import load_value, store_value
from .elements import chunk_of, ends_of, states_of
from .factors import factors_at
from .work_item import CHUNK, FIELDS, NUMBERS, SCALES, SIZE, coefficients_at, floats, work_item


@triton.jit(do_not_specialize=NUMBERS)
def apply(
    table,
    geometries,
    places,
    scratch,
    coefficient_table,
    clip,
    found_inf,
    tensors,
    stride,
    work_items,
    first,
    count,
    reverse,
    STEP: tl.constexpr,
    FORMATS: tl.constexpr,
    COEFFICIENTS: tl.constexpr,
    SCALE_COUNT: tl.constexpr,
    ALONG: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """New parameters and elementwise states."""
    tensor, index = work_item(places, work_items, first, count, reverse)
    own, idle = coefficients_at(table, tensor, coefficient_table, found_inf, tensors, stride, FORMATS)
    if idle:
        return
    factor = tl.load(own) * tl.load(clip)
    store_params = tl.load(own + 1) != 0
    coefficients = coefficients_of(own, COEFFICIENTS)
    geometry = geometries + tensor * FIELDS
    scales = ()
    for i in tl.static_range(SCALE_COUNT):
        scales = scales + (tl.load(floats(scratch, geometry, SCALES) + i),)
    start = index.to(tl.int64) * CHUNK
    left = tl.minimum(tl.load(geometry + SIZE) - start, CHUNK).to(tl.int32)
    arrays, aligned, bits = chunk_of(table, tensor, tensors, start, FORMATS, ALONG)
    ends = ends_of(bits, left, geometry, ALONG, BLOCK)
    factors = factors_at(geometry, scratch, start, ALONG)
    numbers = (factor, store_params, coefficients, scales)
    stepped(arrays, aligned, ends, factors, numbers, STEP, FORMATS, ALONG, BLOCK)


@triton.jit
def stepped(
    arrays,
    aligned,
    ends,
    factors,
    numbers,
    STEP: tl.constexpr,
    FORMATS: tl.constexpr,
    ALONG: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """numbers: factor, store_params, coefficients, scales."""
    even, full, left = ends
    if ALONG != "none":
        for at in range(0, even, BLOCK):
            offsets = at + tl.arange(0, BLOCK)
            _update(aligned, offsets, None, factors, numbers, STEP, FORMATS, ALONG, True)
    for at in range(even, full, BLOCK):
        offsets = at + tl.arange(0, BLOCK)
        _update(aligned, offsets, None, factors, numbers, STEP, FORMATS, ALONG, False)
    for at in range(full, left, BLOCK):
        offsets = at + tl.arange(0, BLOCK)
        _update(arrays, offsets, offsets < left, factors, numbers, STEP, FORMATS, ALONG, False)


@triton.jit
def _update(
    arrays,
    offsets,
    mask,
    factors,
    numbers,
    STEP: tl.constexpr,
    FORMATS: tl.constexpr,
    ALONG: tl.constexpr,
    EVEN: tl.constexpr,
):
    factor, store_params, coefficients, scales = numbers
    p = load_value(arrays, offsets, mask, 0, FORMATS)
    g = load_value(arrays, offsets, mask, 1, FORMATS) * factor
    states = states_of(arrays, factors, offsets, mask, FORMATS, ALONG, EVEN)
    if len(scales):
        amount, states = STEP(p, g, states, coefficients, scales)
    else:
        amount, states = STEP(p, g, states, coefficients)
    if store_params:
        store_value(arrays, offsets, p - amount, mask, 0, FORMATS)
    for i in tl.static_range(2, len(FORMATS)):
        if ALONG == "none" or i >= 4:
            store_value(arrays, offsets, states[i - 2], mask, i, FORMATS)
