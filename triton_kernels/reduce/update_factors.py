"""From the sums over tiles the new averages of rows and columns, and what stands in their place in the passes
over elements.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ... import schedule
from ..engine import coefficients_of
from ..storage import load, store
from .work_item import (
    AVERAGE_SUMS,
    BATCH,
    COLUMN_FACTORS,
    COLUMN_SUMS,
    COLUMN_TILES,
    COLUMNS,
    FIELDS,
    MATRIX_SUMS,
    NUMBERS,
    PART_SUMS,
    PARTS,
    ROW_FACTORS,
    ROW_SUMS,
    ROW_TILES,
    ROWS,
    SUMMED_COLUMNS,
    SUMMED_ROWS,
    UNITS,
    coefficients_at,
    floats,
    work_item,
)

PART = tl.constexpr(schedule.ROWS_OF_PART)
COLUMN_BLOCK = tl.constexpr(schedule.COLUMNS_OF_BLOCK)


@triton.jit(do_not_specialize=NUMBERS)
def update_factors(
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
    AVERAGE: tl.constexpr,
    COLUMN_FACTOR: tl.constexpr,
    FORMATS: tl.constexpr,
    COEFFICIENTS: tl.constexpr,
    ALONG: tl.constexpr,
):
    """The reduced states, and what stands in their place but for rows beside columns."""
    tensor, index = work_item(places, work_items, first, count, reverse)
    own, idle = coefficients_at(table, tensor, coefficient_table, found_inf, tensors, stride, FORMATS)
    if idle:
        return
    coefficients = coefficients_of(own, COEFFICIENTS)
    geometry = geometries + tensor * FIELDS
    if (tl.load(geometry + SUMMED_ROWS) == 0) | (tl.load(geometry + SUMMED_COLUMNS) == 0):
        return  # there is no mean
    states = (
        tl.load(table + 2 * tensors + tensor).to(tl.pointer_type(FORMATS[2][0][0])),
        tl.load(table + 3 * tensors + tensor).to(tl.pointer_type(FORMATS[3][0][0])),
    )
    if ALONG == "columns":
        _average_columns(states, geometry, scratch, index, coefficients, AVERAGE, COLUMN_FACTOR, ALONG)
    elif ALONG == "rows":
        _average_rows(states, geometry, scratch, index, coefficients, AVERAGE, ALONG)
    else:
        row_blocks = tl.cdiv(tl.load(geometry + BATCH) * tl.load(geometry + PARTS), UNITS)
        if index < row_blocks:
            _average_rows(states, geometry, scratch, index, coefficients, AVERAGE, ALONG)
        else:
            block = index - row_blocks
            _average_columns(states, geometry, scratch, block, coefficients, AVERAGE, COLUMN_FACTOR, ALONG)


@triton.jit
def _average_rows(states, geometry, scratch, index, coefficients, AVERAGE: tl.constexpr, ALONG: tl.constexpr):
    batch, rows = tl.load(geometry + BATCH), tl.load(geometry + ROWS)
    units, at, mask = _parts(geometry, index)
    sums = scratch + tl.load(geometry + ROW_SUMS) + at
    total = _total(sums, batch * rows, tl.load(geometry + COLUMN_TILES), mask, 4)
    mean = total / tl.load(geometry + SUMMED_COLUMNS).to(tl.float64)
    if ALONG == "both":
        v = AVERAGE(load(states[0] + at, mask), mean, coefficients)
        store(states[0] + at, v, mask)
        part_sums = scratch + tl.load(geometry + PART_SUMS) + units
        existing = units < batch * tl.load(geometry + PARTS)
        tl.store(part_sums, tl.sum(tl.where(mask, v, 0.0).to(tl.float64), 1), existing)
    else:
        instead = floats(scratch, geometry, ROW_FACTORS)
        _average_pair(states, at, mask, mean, instead, batch * rows, coefficients, AVERAGE)


@triton.jit
def _average_columns(
    states,
    geometry,
    scratch,
    index,
    coefficients,
    AVERAGE: tl.constexpr,
    COLUMN_FACTOR: tl.constexpr,
    ALONG: tl.constexpr,
):
    batch, columns = tl.load(geometry + BATCH), tl.load(geometry + COLUMNS)
    row_tiles = tl.load(geometry + ROW_TILES)
    at = index.to(tl.int64) * COLUMN_BLOCK + tl.arange(0, COLUMN_BLOCK)
    mask = at < batch * columns
    of_matrix = at // columns * row_tiles * columns
    sums = scratch + tl.load(geometry + COLUMN_SUMS) + of_matrix + at % columns
    mean = _total(sums, columns, row_tiles, mask, 8) / tl.load(geometry + SUMMED_ROWS).to(tl.float64)
    instead = floats(scratch, geometry, COLUMN_FACTORS)
    if ALONG == "both":
        v = AVERAGE(load(states[1] + at, mask), mean, coefficients)
        store(states[1] + at, v, mask)
        tl.store(instead + at, COLUMN_FACTOR(v, coefficients), mask)
    else:
        _average_pair(states, at, mask, mean, instead, batch * columns, coefficients, AVERAGE)


@triton.jit
def _average_pair(states, at, mask, mean, instead, size, coefficients, AVERAGE: tl.constexpr):
    v, b, of_p, of_g = AVERAGE(load(states[0] + at, mask), load(states[1] + at, mask), mean, coefficients)
    store(states[0] + at, v, mask)
    store(states[1] + at, b, mask)
    tl.store(instead + at, of_p, mask)
    tl.store(instead + size + at, of_g, mask)


@triton.jit(do_not_specialize=NUMBERS)
def update_row_factors(
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
    AVERAGE: tl.constexpr,
    ROW_FACTOR: tl.constexpr,
    FORMATS: tl.constexpr,
    COEFFICIENTS: tl.constexpr,
):
    """What stands in the place of a row's average, beside the mean over its matrix."""
    tensor, index = work_item(places, work_items, first, count, reverse)
    own, idle = coefficients_at(table, tensor, coefficient_table, found_inf, tensors, stride, FORMATS)
    if idle:
        return
    coefficients = coefficients_of(own, COEFFICIENTS)
    geometry = geometries + tensor * FIELDS
    if tl.load(geometry + SUMMED_COLUMNS) == 0:
        return
    parts = tl.load(geometry + PARTS)
    state = tl.load(table + 2 * tensors + tensor).to(tl.pointer_type(FORMATS[2][0][0]))
    units, at, mask = _parts(geometry, index)
    existing = units < tl.load(geometry + BATCH) * parts
    part_sums = scratch + tl.load(geometry + PART_SUMS) + units // parts * parts
    total = tl.zeros((UNITS, PART), tl.float64)
    for i in range(0, parts, PART):
        others = i + tl.arange(0, PART)
        existing_parts = existing[:, None] & (others < parts)[None, :]
        total += tl.load(part_sums[:, None] + others[None, :], existing_parts, other=0.0)
    rows, summed_rows = tl.load(geometry + ROWS), tl.load(geometry + SUMMED_ROWS)
    mean = tl.sum(total, 1) / rows.to(tl.float64)
    if summed_rows != rows:  # others have more rows; the mean of averages moves as they do
        matrices = scratch + units // parts
        averages = tl.load(matrices + tl.load(geometry + AVERAGE_SUMS), existing, other=0.0)
        sums = tl.load(matrices + tl.load(geometry + MATRIX_SUMS), existing, other=0.0)
        size = summed_rows.to(tl.float64) * tl.load(geometry + SUMMED_COLUMNS).to(tl.float64)
        moved = (averages / summed_rows.to(tl.float64)).to(tl.float32)
        mean = AVERAGE(moved, sums / size, coefficients).to(tl.float64)
    x = ROW_FACTOR(load(state + at, mask), mean[:, None], coefficients)
    tl.store(floats(scratch, geometry, ROW_FACTORS) + at, x, mask)


@triton.jit
def _parts(geometry, index):
    """Of the units of a work item: their numbers, the rows of each, and which of these there are."""
    rows, parts = tl.load(geometry + ROWS), tl.load(geometry + PARTS)
    units = index.to(tl.int64) * UNITS + tl.arange(0, UNITS)
    row = (units % parts * PART)[:, None] + tl.arange(0, PART)[None, :]
    mask = (units < tl.load(geometry + BATCH) * parts)[:, None] & (row < rows)
    return units, (units // parts * rows)[:, None] + row, mask


@triton.jit
def _total(sums, stride, count, mask, AHEAD: tl.constexpr):
    """Of arrays `stride` apart, added in their order, AHEAD of them on their way at once."""
    total = tl.load(sums, mask, other=0.0)
    together = 1 + (count - 1) // AHEAD * AHEAD
    for at in range(1, together, AHEAD):
        for i in tl.static_range(AHEAD):
            total += tl.load(sums + (at + i) * stride, mask, other=0.0)
    for at in range(together, count):
        total += tl.load(sums + at * stride, mask, other=0.0)
    return total
