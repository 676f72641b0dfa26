"""What a program works on, and where that is in memory.

All kernels take the same arguments in front of their constants:

    table              int64: for parameter, gradient and each state a row of addresses, then the indices of
                       coefficients
    geometries         int64 [tensors][FIELDS]
    places             int32 [2][work_items]: tensors, and indices within them; a program takes one of `count`
                       work items from `first` on, with `reverse` the last one first
    scratch            float64; a geometry says where each array begins
    coefficient_table  fp32: factor, store_params, then the coefficients
    clip               fp32, multiplies every gradient
    found_inf          fp32; not 0: change nothing
"""

from __future__ import annotations

import triton
import triton.language as tl

from ... import schedule

NUMBERS = ("tensors", "stride", "work_items", "first", "count", "reverse")

# the fields of a geometry
FIELDS = tl.constexpr(len(schedule.FIELDS))
SIZE = tl.constexpr(schedule.FIELDS.index("size"))
BATCH = tl.constexpr(schedule.FIELDS.index("batch"))
ROWS = tl.constexpr(schedule.FIELDS.index("rows"))
COLUMNS = tl.constexpr(schedule.FIELDS.index("columns"))
TILE_WARPS = tl.constexpr(schedule.FIELDS.index("warps"))
TILE_ROWS = tl.constexpr(schedule.FIELDS.index("tile_rows"))
TILE_COLUMNS = tl.constexpr(schedule.FIELDS.index("tile_columns"))
ROW_TILES = tl.constexpr(schedule.FIELDS.index("row_tiles"))
COLUMN_TILES = tl.constexpr(schedule.FIELDS.index("column_tiles"))
PARTS = tl.constexpr(schedule.FIELDS.index("parts"))
ROW_SUMS = tl.constexpr(schedule.FIELDS.index("row_sums"))
COLUMN_SUMS = tl.constexpr(schedule.FIELDS.index("column_sums"))
PART_SUMS = tl.constexpr(schedule.FIELDS.index("part_sums"))
ROW_FACTORS = tl.constexpr(schedule.FIELDS.index("row_factors"))
COLUMN_FACTORS = tl.constexpr(schedule.FIELDS.index("column_factors"))
SUMS = tl.constexpr(schedule.FIELDS.index("sums"))
SCALES = tl.constexpr(schedule.FIELDS.index("scales"))
CHUNKS = tl.constexpr(schedule.FIELDS.index("chunks"))
SUMMED_ROWS = tl.constexpr(schedule.FIELDS.index("summed_rows"))
SUMMED_COLUMNS = tl.constexpr(schedule.FIELDS.index("summed_columns"))
SUMMED_SIZE = tl.constexpr(schedule.FIELDS.index("summed_size"))
MATRIX_SUMS = tl.constexpr(schedule.FIELDS.index("matrix_sums"))
AVERAGE_SUMS = tl.constexpr(schedule.FIELDS.index("average_sums"))
ROW_NORMS = tl.constexpr(schedule.FIELDS.index("row_norms"))
HALF = tl.constexpr(schedule.FIELDS.index("half"))

CHUNK = tl.constexpr(schedule.CHUNK_SIZE)
UNITS = tl.constexpr(schedule.WARPS)  # of an work_item: tiles of one warp, parts, rows


@triton.jit
def work_item(places, work_items, first, count, reverse):
    """The tensor that this program works on, and the index within it."""
    program = tl.program_id(0)
    at = first + tl.where(reverse != 0, count - 1 - program, program)
    return tl.load(places + at), tl.load(places + work_items + at)


@triton.jit
def coefficients_at(table, tensor, coefficient_table, found_inf, tensors, stride, FORMATS: tl.constexpr):
    """The tensor's coefficients, and whether nothing of it is to be changed."""
    index = tl.load(table + len(FORMATS) * tensors + tensor)
    return coefficient_table + tl.maximum(index, 0) * stride, (index < 0) | (tl.load(found_inf) != 0)


@triton.jit
def floats(scratch, geometry, FIELD: tl.constexpr):
    place = (scratch + tl.load(geometry + FIELD)).to(tl.pointer_type(tl.float32), bitcast=True)
    return tl.multiple_of(place, 16)
