"""Sums over whole tensors, and the scales of each tensor's step that follow from them."""

from __future__ import annotations

import triton
import triton.language as tl

from ..engine import coefficients_of
from ..formats import load_value
from .elements import chunk_of, ends_of, states_of
from .factors import factors_at
from .work_item import (
    CHUNK,
    CHUNKS,
    FIELDS,
    NUMBERS,
    SCALES,
    SIZE,
    SUMMED_SIZE,
    SUMS,
    coefficients_at,
    floats,
    work_item,
)

CHUNKS_AT_ONCE = tl.constexpr(1024)


@triton.jit(do_not_specialize=NUMBERS)
def reduce_norms(
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
    NEEDS_NORMS: tl.constexpr,
    NORMS_NEED_P: tl.constexpr,
    NORM_TERMS: tl.constexpr,
    FORMATS: tl.constexpr,
    COEFFICIENTS: tl.constexpr,
    TERMS: tl.constexpr,
    ALONG: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sums of terms over chunks."""
    tensor, index = work_item(places, work_items, first, count, reverse)
    own, idle = coefficients_at(table, tensor, coefficient_table, found_inf, tensors, stride, FORMATS)
    if idle:
        return
    coefficients = coefficients_of(own, COEFFICIENTS)
    if NEEDS_NORMS(coefficients):
        geometry = geometries + tensor * FIELDS
        factor = tl.load(own) * tl.load(clip)
        start = index.to(tl.int64) * CHUNK
        left = tl.minimum(tl.load(geometry + SIZE) - start, CHUNK).to(tl.int32)
        arrays, aligned, bits = chunk_of(table, tensor, tensors, start, FORMATS, ALONG)
        ends = ends_of(bits, left, geometry, ALONG, BLOCK)
        factors = factors_at(geometry, scratch, start, ALONG)
        with_p = tl.full((), True, tl.int1)
        if NORMS_NEED_P is not None:
            with_p = NORMS_NEED_P(coefficients)
        numbers = (factor, coefficients, with_p)
        totals = norm_sums(arrays, aligned, ends, factors, numbers, NORM_TERMS, TERMS, FORMATS, ALONG, BLOCK)
        sums = scratch + tl.load(geometry + SUMS) + index.to(tl.int64) * TERMS
        for i in tl.static_range(TERMS):
            tl.store(sums + i, totals[i])


@triton.jit
def norm_sums(
    arrays,
    aligned,
    ends,
    factors,
    numbers,
    NORM_TERMS: tl.constexpr,
    TERMS: tl.constexpr,
    FORMATS: tl.constexpr,
    ALONG: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sums of the terms of a chunk: each position of a block by itself in fp32, all of these in float64.

    numbers: factor, coefficients, whether p is needed.
    """
    even, full, left = ends
    first = tl.zeros((BLOCK,), tl.float32)
    second = tl.zeros((BLOCK,), tl.float32)
    if ALONG != "none":
        for at in range(0, even, BLOCK):
            offsets = at + tl.arange(0, BLOCK)
            terms = _terms(aligned, offsets, None, factors, numbers, NORM_TERMS, FORMATS, ALONG, True)
            first += terms[0]
            if TERMS > 1:
                second += terms[1]
    for at in range(even, full, BLOCK):
        offsets = at + tl.arange(0, BLOCK)
        terms = _terms(aligned, offsets, None, factors, numbers, NORM_TERMS, FORMATS, ALONG, False)
        first += terms[0]
        if TERMS > 1:
            second += terms[1]
    for at in range(full, left, BLOCK):
        offsets = at + tl.arange(0, BLOCK)
        mask = offsets < left
        terms = _terms(arrays, offsets, mask, factors, numbers, NORM_TERMS, FORMATS, ALONG, False)
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
    factors,
    numbers,
    NORM_TERMS: tl.constexpr,
    FORMATS: tl.constexpr,
    ALONG: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Without p, which then counts as 0, it is not read; the compiler drops loads that nothing needs."""
    factor, coefficients, with_p = numbers
    wanted = tl.where(with_p, offsets >= 0, False)  # the interpreter cannot spread a truth value
    if mask is not None:
        wanted = wanted & mask
    p = tl.where(wanted, load_value(arrays, offsets, wanted, 0, FORMATS), 0.0)
    g = load_value(arrays, offsets, mask, 1, FORMATS) * factor
    states = states_of(arrays, factors, offsets, mask, FORMATS, ALONG, EVEN)
    return NORM_TERMS(p, g, states, coefficients)


@triton.jit(do_not_specialize=NUMBERS)
def finalize(
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
    NEEDS_NORMS: tl.constexpr,
    FINALIZE: tl.constexpr,
    FORMATS: tl.constexpr,
    COEFFICIENTS: tl.constexpr,
    TERMS: tl.constexpr,
):
    """The scales of a tensor's step, from the sums over its chunks."""
    tensor = first + tl.program_id(0)
    own, idle = coefficients_at(table, tensor, coefficient_table, found_inf, tensors, stride, FORMATS)
    if idle:
        return
    coefficients = coefficients_of(own, COEFFICIENTS)
    geometry = geometries + tensor * FIELDS
    size = tl.load(geometry + SUMMED_SIZE)
    chunks = tl.where(NEEDS_NORMS(coefficients), tl.load(geometry + CHUNKS), 0)
    sums = scratch + tl.load(geometry + SUMS)
    totals = ()
    for i in tl.static_range(TERMS):
        total = tl.zeros((CHUNKS_AT_ONCE,), tl.float64)
        for at in range(0, chunks, CHUNKS_AT_ONCE):
            offsets = at + tl.arange(0, CHUNKS_AT_ONCE)
            total += tl.load(sums + offsets * TERMS + i, offsets < chunks, other=0.0)
        totals = totals + (tl.sum(total, 0),)
    scales = FINALIZE(totals, size, coefficients)
    for i in tl.static_range(len(scales)):
        tl.store(floats(scratch, geometry, SCALES) + i, scales[i])
