"""Rules that take each row of a matrix by itself."""

from __future__ import annotations

import triton
import triton.language as tl

from ..engine import coefficients_of
from .elements import arrays_of, ends_of
from .job import BATCH, CHUNK, COLUMNS, FIELDS, NUMBERS, ROWS, UNITS, entry, row_of
from .measure import measured
from .step import stepped


@triton.jit(do_not_specialize=NUMBERS)
def rows_kernel(
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
    MEASURE: tl.constexpr,
    SETTLE: tl.constexpr,
    STEP: tl.constexpr,
    DTYPES: tl.constexpr,
    COEFFICIENTS: tl.constexpr,
    TERMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Measure, settle and step of each row by itself, with one sum."""
    tl.static_assert(TERMS == 1)
    tensor, index = entry(places, entries, first, count, reverse)
    row, idle = row_of(table, tensor, rows, found_inf, tensors, row_stride, DTYPES)
    if idle:
        return
    factor = tl.load(row) * tl.load(clip)
    store_params = tl.load(row + 1) != 0
    coefficients = coefficients_of(row, COEFFICIENTS)
    geometry = geometries + tensor * FIELDS
    columns = tl.load(geometry + COLUMNS)
    above = index.to(tl.int64) * UNITS
    below = tl.minimum(above + UNITS, tl.load(geometry + BATCH) * tl.load(geometry + ROWS))
    for r in range(above, below):
        total = tl.full((), 0.0, tl.float64)
        for at in range(0, columns, CHUNK):
            arrays, aligned, bits = arrays_of(table, tensor, tensors, r * columns + at, DTYPES, "none")
            ends = ends_of(bits, tl.minimum(columns - at, CHUNK).to(tl.int32), geometry, "none", BLOCK)
            with_p = tl.full((), True, tl.int1)
            totals = measured(
                arrays, aligned, ends, (), factor, coefficients, with_p, MEASURE, TERMS, "none", BLOCK
            )
            total += totals[0]
        factors = SETTLE((total,), columns, coefficients)
        arrays, aligned, bits = arrays_of(table, tensor, tensors, r * columns, DTYPES, "none")
        ends = ends_of(bits, columns, geometry, "none", BLOCK)
        stepped(arrays, aligned, ends, (), factor, store_params, coefficients, factors, STEP, "none", BLOCK)
