"""Rules that take each row of a matrix by itself."""

from __future__ import annotations

import triton
import triton.language as tl

from ..engine import coefficients_of
from .apply import stepped
from .elements import chunk_of, ends_of
from .reduce_norms import norm_sums
from .work_item import (
    BATCH,
    CHUNK,
    COLUMNS,
    FIELDS,
    HALF,
    NUMBERS,
    ROW_NORMS,
    ROWS,
    SUMMED_COLUMNS,
    UNITS,
    coefficients_at,
    work_item,
)


@triton.jit(do_not_specialize=NUMBERS)
def apply_by_row(
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
    NORM_TERMS: tl.constexpr,
    FINALIZE: tl.constexpr,
    STEP: tl.constexpr,
    FORMATS: tl.constexpr,
    COEFFICIENTS: tl.constexpr,
    TERMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """reduce_norms, finalize and apply of each row by itself, with one sum; or one half of these."""
    tl.static_assert(TERMS == 1)
    tensor, index = work_item(places, work_items, first, count, reverse)
    own, idle = coefficients_at(table, tensor, coefficient_table, found_inf, tensors, stride, FORMATS)
    if idle:
        return
    factor = tl.load(own) * tl.load(clip)
    store_params = tl.load(own + 1) != 0
    coefficients = coefficients_of(own, COEFFICIENTS)
    geometry = geometries + tensor * FIELDS
    columns, half = tl.load(geometry + COLUMNS), tl.load(geometry + HALF)
    above = index.to(tl.int64) * UNITS
    below = tl.minimum(above + UNITS, tl.load(geometry + BATCH) * tl.load(geometry + ROWS))
    for r in range(above, below):
        total = tl.full((), 0.0, tl.float64)
        norm = scratch + tl.load(geometry + ROW_NORMS) + r
        if half == 2:
            total = tl.load(norm)
        for at in range(0, tl.where(half == 2, 0, columns), CHUNK):
            arrays, aligned, bits = chunk_of(table, tensor, tensors, r * columns + at, FORMATS, "none")
            ends = ends_of(bits, tl.minimum(columns - at, CHUNK).to(tl.int32), geometry, "none", BLOCK)
            with_p = tl.full((), True, tl.int1)
            numbers = (factor, coefficients, with_p)
            totals = norm_sums(arrays, aligned, ends, (), numbers, NORM_TERMS, TERMS, FORMATS, "none", BLOCK)
            total += totals[0]
        if half == 1:
            tl.store(norm, total)
        else:
            scales = FINALIZE((total,), tl.load(geometry + SUMMED_COLUMNS), coefficients)
            arrays, aligned, bits = chunk_of(table, tensor, tensors, r * columns, FORMATS, "none")
            ends = ends_of(bits, columns, geometry, "none", BLOCK)
            scaled = (factor, store_params, coefficients, scales)
            stepped(arrays, aligned, ends, (), scaled, STEP, FORMATS, "none", BLOCK)
