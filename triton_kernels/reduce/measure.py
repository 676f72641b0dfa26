"""Sums over whole tensors, and the factors of each tensor's step that follow from them."""

from __future__ import annotations

import triton
import triton.language as tl

from ..engine import coefficients_of
from ..storage import load
from .elements import arrays_of, ends_of, states_of
from .job import CHUNK, FACTORS, FIELDS, NUMBERS, SIZE, SUMS, entry, floats, row_of
from .stand_ins import stand_ins_at

CHUNKS_AT_ONCE = tl.constexpr(1024)


@triton.jit(do_not_specialize=NUMBERS)
def measure(
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
    MEASURES: tl.constexpr,
    MEASURES_P: tl.constexpr,
    MEASURE: tl.constexpr,
    DTYPES: tl.constexpr,
    COEFFICIENTS: tl.constexpr,
    TERMS: tl.constexpr,
    ALONG: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sums of terms over chunks."""
    tensor, index = entry(places, entries, first, count, reverse)
    row, idle = row_of(table, tensor, rows, found_inf, tensors, row_stride, DTYPES)
    if idle:
        return
    coefficients = coefficients_of(row, COEFFICIENTS)
    if MEASURES(coefficients):
        geometry = geometries + tensor * FIELDS
        factor = tl.load(row) * tl.load(clip)
        start = index.to(tl.int64) * CHUNK
        left = tl.minimum(tl.load(geometry + SIZE) - start, CHUNK).to(tl.int32)
        arrays, aligned, bits = arrays_of(table, tensor, tensors, start, DTYPES, ALONG)
        ends = ends_of(bits, left, geometry, ALONG, BLOCK)
        stand_ins = stand_ins_at(geometry, scratch, start, ALONG)
        with_p = tl.full((), True, tl.int1)
        if MEASURES_P is not None:
            with_p = MEASURES_P(coefficients)
        totals = measured(
            arrays, aligned, ends, stand_ins, factor, coefficients, with_p, MEASURE, TERMS, ALONG, BLOCK
        )
        sums = scratch + tl.load(geometry + SUMS) + index.to(tl.int64) * TERMS
        for i in tl.static_range(TERMS):
            tl.store(sums + i, totals[i])


@triton.jit
def measured(
    arrays,
    aligned,
    ends,
    stand_ins,
    factor,
    coefficients,
    with_p,
    MEASURE: tl.constexpr,
    TERMS: tl.constexpr,
    ALONG: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sums of the terms of a chunk: each position of a block by itself in fp32, all of these in float64."""
    even, full, left = ends
    first = tl.zeros((BLOCK,), tl.float32)
    second = tl.zeros((BLOCK,), tl.float32)
    if ALONG != "none":
        for at in range(0, even, BLOCK):
            offsets = at + tl.arange(0, BLOCK)
            terms = _terms(
                aligned, offsets, None, stand_ins, factor, coefficients, with_p, MEASURE, ALONG, True
            )
            first += terms[0]
            if TERMS > 1:
                second += terms[1]
    for at in range(even, full, BLOCK):
        offsets = at + tl.arange(0, BLOCK)
        terms = _terms(aligned, offsets, None, stand_ins, factor, coefficients, with_p, MEASURE, ALONG, False)
        first += terms[0]
        if TERMS > 1:
            second += terms[1]
    for at in range(full, left, BLOCK):
        offsets = at + tl.arange(0, BLOCK)
        mask = offsets < left
        terms = _terms(arrays, offsets, mask, stand_ins, factor, coefficients, with_p, MEASURE, ALONG, False)
        first += tl.where(mask, terms[0], 0.0)
        if TERMS > 1:
            second += tl.where(mask, terms[1], 0.0)
    totals = (tl.sum(first.to(tl.float64), 0),)
    if TERMS > 1:
        totals = totals + (tl.sum(second.to(tl.float64), 0),)
    return totals


@triton.jit
def _terms(
    arrays,
    offsets,
    mask,
    stand_ins,
    factor,
    coefficients,
    with_p,
    MEASURE: tl.constexpr,
    ALONG: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Without p, which then counts as 0, it is not read; the compiler drops loads that nothing needs."""
    wanted = tl.where(with_p, offsets >= 0, False)  # the interpreter cannot spread a truth value
    if mask is not None:
        wanted = wanted & mask
    p = tl.where(wanted, load(arrays[0] + offsets, wanted), 0.0)
    g = load(arrays[1] + offsets, mask) * factor
    return MEASURE(p, g, states_of(arrays, stand_ins, offsets, mask, ALONG, EVEN), coefficients)


@triton.jit(do_not_specialize=NUMBERS)
def settle(
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
    MEASURES: tl.constexpr,
    SETTLE: tl.constexpr,
    DTYPES: tl.constexpr,
    COEFFICIENTS: tl.constexpr,
    TERMS: tl.constexpr,
):
    """The factors of a tensor's step, from the sums over its chunks."""
    tensor = first + tl.program_id(0)
    row, idle = row_of(table, tensor, rows, found_inf, tensors, row_stride, DTYPES)
    if idle:
        return
    coefficients = coefficients_of(row, COEFFICIENTS)
    geometry = geometries + tensor * FIELDS
    size = tl.load(geometry + SIZE)
    chunks = tl.where(MEASURES(coefficients), tl.cdiv(size, CHUNK), 0)
    sums = scratch + tl.load(geometry + SUMS)
    totals = ()
    for i in tl.static_range(TERMS):
        total = tl.zeros((CHUNKS_AT_ONCE,), tl.float64)
        for at in range(0, chunks, CHUNKS_AT_ONCE):
            offsets = at + tl.arange(0, CHUNKS_AT_ONCE)
            total += tl.load(sums + offsets * TERMS + i, offsets < chunks, other=0.0)
        totals = totals + (tl.sum(total, 0),)
    factors = SETTLE(totals, size, coefficients)
    for i in tl.static_range(len(factors)):
        tl.store(floats(scratch, geometry, FACTORS) + i, factors[i])
