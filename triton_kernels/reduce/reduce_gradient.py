"""The pass over gradients: sums of a statistic along the rows and columns of tiles, or along one of them."""

from __future__ import annotations

import triton
import triton.language as tl

from ... import schedule
from ..engine import coefficients_of
from ..storage import load
from .work_item import (
    BATCH,
    COLUMN_SUMS,
    COLUMN_TILES,
    COLUMNS,
    FIELDS,
    NUMBERS,
    ROW_SUMS,
    ROW_TILES,
    ROWS,
    TILE_COLUMNS,
    TILE_ROWS,
    TILE_WARPS,
    UNITS,
    coefficients_at,
    work_item,
)

WHOLE = tl.constexpr(schedule.WARPS)  # warps of a tile that is an work_item by itself
LANE = tl.constexpr(schedule.COLUMNS_OF_LANE)
LINES = tl.constexpr(2 * schedule.ROWS_OF_LANE * schedule.LANES)  # rows of a turn, if it were one lane wide


@triton.jit(do_not_specialize=NUMBERS)
def reduce_gradient(
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
    STATISTIC: tl.constexpr,
    FORMATS: tl.constexpr,
    COEFFICIENTS: tl.constexpr,
    ALONG: tl.constexpr,
    LANES: tl.constexpr,  # of the tensors in these work_items
):
    """Sums of the statistic over the rows and the columns of tiles."""
    tensor, index = work_item(places, work_items, first, count, reverse)
    own, idle = coefficients_at(table, tensor, coefficient_table, found_inf, tensors, stride, FORMATS)
    if idle:
        return
    factor = tl.load(own) * tl.load(clip)
    coefficients = coefficients_of(own, COEFFICIENTS)
    geometry = geometries + tensor * FIELDS
    columns = tl.load(geometry + COLUMNS)
    tiles = tl.load(geometry + BATCH) * tl.load(geometry + ROW_TILES) * tl.load(geometry + COLUMN_TILES)
    tiles_here = tl.where(tl.load(geometry + TILE_WARPS) == WHOLE, 1, UNITS)
    address = tl.load(table + tensors + tensor)
    # accesses of 16 bytes need to know that columns are a multiple of as many elements, and the alignment
    VECTOR: tl.constexpr = 128 // FORMATS[1][0][0].primitive_bitwidth
    whole = columns // VECTOR * VECTOR
    aligned = tl.multiple_of((address // 16 * 16).to(tl.pointer_type(FORMATS[1][0][0])), 16)
    if (whole == columns) & (address % 16 == 0):
        for i in range(tiles_here):
            tile = index.to(tl.int64) * tiles_here + i
            if tile < tiles:
                _tile(aligned, whole, tile, geometry, scratch, factor, coefficients, STATISTIC, ALONG, LANES)
    else:
        gradient = address.to(tl.pointer_type(FORMATS[1][0][0]))
        for i in range(tiles_here):
            tile = index.to(tl.int64) * tiles_here + i
            if tile < tiles:
                _tile(
                    gradient, columns, tile, geometry, scratch, factor, coefficients, STATISTIC, ALONG, LANES
                )


@triton.jit
def _tile(
    gradient,
    columns,
    tile,
    geometry,
    scratch,
    factor,
    coefficients,
    STATISTIC: tl.constexpr,
    ALONG: tl.constexpr,
    LANES: tl.constexpr,
):
    WIDTH: tl.constexpr = LANE * LANES
    HEIGHT: tl.constexpr = LINES // LANES
    rows, batch = tl.load(geometry + ROWS), tl.load(geometry + BATCH)
    row_tiles, column_tiles = tl.load(geometry + ROW_TILES), tl.load(geometry + COLUMN_TILES)
    tile_rows = tl.load(geometry + TILE_ROWS)
    tile_columns = tl.load(geometry + TILE_COLUMNS) // WIDTH * WIDTH  # says that it is a multiple
    line = tile // column_tiles
    matrix, row_tile, column_tile = line // row_tiles, line % row_tiles, tile % column_tiles
    top, left = row_tile * tile_rows, column_tile * tile_columns
    bottom, right = tl.minimum(top + tile_rows, rows), tl.minimum(left + tile_columns, columns)
    row_sums = scratch + tl.load(geometry + ROW_SUMS) + (column_tile * batch + matrix) * rows
    column_sums = scratch + tl.load(geometry + COLUMN_SUMS) + line * columns
    along_columns = tl.zeros((HEIGHT, WIDTH), tl.float32)
    for r in range(top, bottom, HEIGHT):
        at_rows = r + tl.arange(0, HEIGHT)
        along_rows = tl.zeros((HEIGHT, WIDTH), tl.float32)
        for c in range(left, right, WIDTH):
            at_columns = c + tl.arange(0, WIDTH)
            mask = (at_rows < rows)[:, None] & (at_columns < columns)[None, :]
            offsets = ((matrix * rows + at_rows) * columns)[:, None] + at_columns[None, :]
            square = STATISTIC(load(gradient + offsets, mask) * factor, coefficients)
            square = tl.where(mask, square, 0.0)
            if ALONG != "columns":
                along_rows += square
            if ALONG != "rows":
                along_columns += square
        if ALONG == "both":  # of one block, in fp32
            tl.store(row_sums + at_rows, tl.sum(along_rows, 1).to(tl.float64), at_rows < rows)
        if ALONG == "rows":
            tl.store(row_sums + at_rows, tl.sum(along_rows.to(tl.float64), 1), at_rows < rows)
    if ALONG != "rows":  # a tile is one block wide
        at_columns = left + tl.arange(0, WIDTH)
        total = tl.sum(along_columns.to(tl.float64), 0)
        tl.store(column_sums + at_columns, total, at_columns < columns)
