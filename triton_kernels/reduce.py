"""The passes of rules that reduce, as python/danlu/backends/schedule.py divides them. Knows no optimizer.

All kernels take the same arguments in front of their constants:

    table       int64: for parameter, gradient and each state a row of addresses, then the indices of rows
    geometries  int64 [tensors][FIELDS]
    places      int32 [2][entries]: tensors, and indices within them; a program takes one of `count`
                entries from `first` on, with `reverse` the last one first
    scratch     float64; a geometry says where each array begins
    rows        fp32: factor, store_params, then the coefficients
    clip        fp32, multiplies every gradient
    found_inf   fp32; not 0: change nothing
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..backends import schedule
from .engine import coefficients_of
from .storage import load, store

ARGUMENTS = ("table", "geometries", "places", "scratch", "rows", "clip", "found_inf")
NUMBERS = ("tensors", "row_stride", "entries", "first", "count", "reverse")
WARPS = schedule.WARPS  # of collect, average, spread; of the others as many as the engine's

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
OF_ROWS = tl.constexpr(schedule.FIELDS.index("of_rows"))
OF_COLUMNS = tl.constexpr(schedule.FIELDS.index("of_columns"))
SUMS = tl.constexpr(schedule.FIELDS.index("sums"))
FACTORS = tl.constexpr(schedule.FIELDS.index("factors"))

UNITS = tl.constexpr(schedule.WARPS)  # of an entry: tiles of one warp, parts, rows
WHOLE = tl.constexpr(schedule.WARPS)  # warps of a tile that is an entry by itself
LANE = tl.constexpr(schedule.COLUMNS_OF_LANE)
LINES = tl.constexpr(schedule.ROWS_OF_LANE * schedule.LANES)  # of a turn of one lane
PART = tl.constexpr(schedule.ROWS_OF_PART)
COLUMN_BLOCK = tl.constexpr(schedule.COLUMNS_OF_BLOCK)
CHUNK = tl.constexpr(schedule.CHUNK_SIZE)
AHEAD = tl.constexpr(8)  # sums that are on their way at once
CHUNKS_AT_ONCE = tl.constexpr(1024)


@triton.jit(do_not_specialize=NUMBERS)
def collect(
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
    STATISTIC: tl.constexpr,
    DTYPES: tl.constexpr,
    COEFFICIENTS: tl.constexpr,
    ALONG: tl.constexpr,
    LANES: tl.constexpr,  # of the tensors in these entries
):
    """Sums of the statistic over the rows and the columns of tiles."""
    tensor, index = _entry(places, entries, first, count, reverse)
    row, idle = _row(table, tensor, rows, found_inf, tensors, row_stride, DTYPES)
    if idle:
        return
    factor = tl.load(row) * tl.load(clip)
    coefficients = coefficients_of(row, COEFFICIENTS)
    geometry = geometries + tensor * FIELDS
    columns = tl.load(geometry + COLUMNS)
    tiles = tl.load(geometry + BATCH) * tl.load(geometry + ROW_TILES) * tl.load(geometry + COLUMN_TILES)
    tiles_here = tl.where(tl.load(geometry + TILE_WARPS) == WHOLE, 1, UNITS)
    address = tl.load(table + tensors + tensor)
    # accesses of 16 bytes need to know that columns are a multiple of as many elements, and the alignment
    VECTOR: tl.constexpr = 128 // DTYPES[1].primitive_bitwidth
    whole = columns // VECTOR * VECTOR
    aligned = tl.multiple_of((address // 16 * 16).to(tl.pointer_type(DTYPES[1])), 16)
    if (whole == columns) & (address % 16 == 0):
        for i in range(tiles_here):
            tile = index.to(tl.int64) * tiles_here + i
            if tile < tiles:
                _tile(aligned, whole, tile, geometry, scratch, factor, coefficients, STATISTIC, ALONG, LANES)
    else:
        gradient = address.to(tl.pointer_type(DTYPES[1]))
        for i in range(tiles_here):
            tile = index.to(tl.int64) * tiles_here + i
            if tile < tiles:
                _tile(gradient, columns, tile, geometry, scratch, factor, coefficients, STATISTIC, ALONG, LANES)


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


@triton.jit(do_not_specialize=NUMBERS)
def average(
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
    AVERAGE: tl.constexpr,
    ALONG_COLUMNS: tl.constexpr,
    DTYPES: tl.constexpr,
    COEFFICIENTS: tl.constexpr,
    ALONG: tl.constexpr,
):
    """The reduced states, and what stands in their place but for rows beside columns."""
    tensor, index = _entry(places, entries, first, count, reverse)
    row, idle = _row(table, tensor, rows, found_inf, tensors, row_stride, DTYPES)
    if idle:
        return
    coefficients = coefficients_of(row, COEFFICIENTS)
    geometry = geometries + tensor * FIELDS
    batch = tl.load(geometry + BATCH)
    of_rows, of_columns = tl.load(geometry + ROWS), tl.load(geometry + COLUMNS)
    column_tiles, row_tiles = tl.load(geometry + COLUMN_TILES), tl.load(geometry + ROW_TILES)
    first_state = tl.load(table + 2 * tensors + tensor).to(tl.pointer_type(DTYPES[2]))
    second_state = tl.load(table + 3 * tensors + tensor).to(tl.pointer_type(DTYPES[3]))
    row_blocks = 0
    if ALONG != "columns":
        row_blocks = tl.cdiv(batch * tl.load(geometry + PARTS), UNITS)
    if index < row_blocks:
        if ALONG != "columns":
            units, at, mask = _parts(geometry, index)
            sums = scratch + tl.load(geometry + ROW_SUMS)
            mean = _total(sums + at, batch * of_rows, column_tiles, mask) / of_columns.to(tl.float64)
            if ALONG == "both":
                v = AVERAGE(load(first_state + at, mask), mean, coefficients)
                store(first_state + at, v, mask)
                part_sums = scratch + tl.load(geometry + PART_SUMS)
                total = tl.sum(tl.where(mask, v, 0.0).to(tl.float64), 1)
                tl.store(part_sums + units, total, units < batch * tl.load(geometry + PARTS))
            else:
                places_of = _floats(scratch, geometry, OF_ROWS)
                v, b = load(first_state + at, mask), load(second_state + at, mask)
                v, b, of_p, of_g = AVERAGE(v, b, mean, coefficients)
                store(first_state + at, v, mask)
                store(second_state + at, b, mask)
                tl.store(places_of + at, of_p, mask)
                tl.store(places_of + batch * of_rows + at, of_g, mask)
    else:
        if ALONG != "rows":
            at = (index - row_blocks).to(tl.int64) * COLUMN_BLOCK + tl.arange(0, COLUMN_BLOCK)
            mask = at < batch * of_columns
            sums = scratch + tl.load(geometry + COLUMN_SUMS)
            places_of = _floats(scratch, geometry, OF_COLUMNS)
            matrix, column = at // of_columns, at % of_columns
            sums += matrix * row_tiles * of_columns + column
            mean = _total(sums, of_columns, row_tiles, mask) / of_rows.to(tl.float64)
            if ALONG == "both":
                v = AVERAGE(load(second_state + at, mask), mean, coefficients)
                store(second_state + at, v, mask)
                tl.store(places_of + at, ALONG_COLUMNS(v, coefficients), mask)
            else:
                v, b = load(first_state + at, mask), load(second_state + at, mask)
                v, b, of_p, of_g = AVERAGE(v, b, mean, coefficients)
                store(first_state + at, v, mask)
                store(second_state + at, b, mask)
                tl.store(places_of + at, of_p, mask)
                tl.store(places_of + batch * of_columns + at, of_g, mask)


@triton.jit(do_not_specialize=NUMBERS)
def spread(
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
    ALONG_ROWS: tl.constexpr,
    DTYPES: tl.constexpr,
    COEFFICIENTS: tl.constexpr,
):
    """What stands in the place of a row's average, beside the mean over its matrix."""
    tensor, index = _entry(places, entries, first, count, reverse)
    row, idle = _row(table, tensor, rows, found_inf, tensors, row_stride, DTYPES)
    if idle:
        return
    coefficients = coefficients_of(row, COEFFICIENTS)
    geometry = geometries + tensor * FIELDS
    parts = tl.load(geometry + PARTS)
    state = tl.load(table + 2 * tensors + tensor).to(tl.pointer_type(DTYPES[2]))
    units, at, mask = _parts(geometry, index)
    existing = units < tl.load(geometry + BATCH) * parts
    part_sums = scratch + tl.load(geometry + PART_SUMS) + units // parts * parts
    total = tl.zeros((UNITS, PART), tl.float64)
    for i in range(0, parts, PART):
        others = i + tl.arange(0, PART)
        existing_parts = existing[:, None] & (others < parts)[None, :]
        total += tl.load(part_sums[:, None] + others[None, :], existing_parts, other=0.0)
    mean = tl.sum(total, 1) / tl.load(geometry + ROWS).to(tl.float64)
    x = ALONG_ROWS(load(state + at, mask), mean[:, None], coefficients)
    tl.store(_floats(scratch, geometry, OF_ROWS) + at, x, mask)


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
    MEASURE: tl.constexpr,
    DTYPES: tl.constexpr,
    COEFFICIENTS: tl.constexpr,
    TERMS: tl.constexpr,
    ALONG: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sums of terms over chunks."""
    tensor, index = _entry(places, entries, first, count, reverse)
    row, idle = _row(table, tensor, rows, found_inf, tensors, row_stride, DTYPES)
    if idle:
        return
    coefficients = coefficients_of(row, COEFFICIENTS)
    if MEASURES(coefficients):
        geometry = geometries + tensor * FIELDS
        factor = tl.load(row) * tl.load(clip)
        start = index.to(tl.int64) * CHUNK
        left = tl.minimum(tl.load(geometry + SIZE) - start, CHUNK).to(tl.int32)
        arrays, aligned, bits = _arrays(table, tensor, tensors, start, DTYPES, ALONG)
        full = tl.where(bits % 16 == 0, left // BLOCK * BLOCK, 0)
        place = _place(geometry, scratch, start, ALONG)
        totals = _measured(
            arrays, aligned, full, left, place, factor, coefficients, MEASURE, TERMS, ALONG, BLOCK
        )
        sums = scratch + tl.load(geometry + SUMS) + index.to(tl.int64) * TERMS
        for i in tl.static_range(TERMS):
            tl.store(sums + i, totals[i])


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
    row, idle = _row(table, tensor, rows, found_inf, tensors, row_stride, DTYPES)
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
        tl.store(_floats(scratch, geometry, FACTORS) + i, factors[i])


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
    tensor, index = _entry(places, entries, first, count, reverse)
    row, idle = _row(table, tensor, rows, found_inf, tensors, row_stride, DTYPES)
    if idle:
        return
    factor = tl.load(row) * tl.load(clip)
    store_params = tl.load(row + 1) != 0
    coefficients = coefficients_of(row, COEFFICIENTS)
    geometry = geometries + tensor * FIELDS
    factors = ()
    for i in tl.static_range(FACTOR_COUNT):
        factors = factors + (tl.load(_floats(scratch, geometry, FACTORS) + i),)
    start = index.to(tl.int64) * CHUNK
    left = tl.minimum(tl.load(geometry + SIZE) - start, CHUNK).to(tl.int32)
    arrays, aligned, bits = _arrays(table, tensor, tensors, start, DTYPES, ALONG)
    full = tl.where(bits % 16 == 0, left // BLOCK * BLOCK, 0)
    place = _place(geometry, scratch, start, ALONG)
    _stepped(
        arrays, aligned, full, left, place, factor, store_params, coefficients, factors, STEP, ALONG, BLOCK
    )


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
    """Measure, settle and step of each row by itself."""
    tensor, index = _entry(places, entries, first, count, reverse)
    row, idle = _row(table, tensor, rows, found_inf, tensors, row_stride, DTYPES)
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
        arrays, aligned, bits = _arrays(table, tensor, tensors, r * columns, DTYPES, "none")
        full = tl.where(bits % 16 == 0, columns // BLOCK * BLOCK, 0)
        totals = _measured(
            arrays, aligned, full, columns, (), factor, coefficients, MEASURE, TERMS, "none", BLOCK
        )
        factors = SETTLE(totals, columns, coefficients)
        _stepped(
            arrays,
            aligned,
            full,
            columns,
            (),
            factor,
            store_params,
            coefficients,
            factors,
            STEP,
            "none",
            BLOCK,
        )


# what the passes share


@triton.jit
def _entry(places, entries, first, count, reverse):
    """The tensor that this program works on, and the index within it."""
    program = tl.program_id(0)
    at = first + tl.where(reverse != 0, count - 1 - program, program)
    return tl.load(places + at), tl.load(places + entries + at)


@triton.jit
def _row(table, tensor, rows, found_inf, tensors, row_stride, DTYPES: tl.constexpr):
    """The tensor's coefficient row, and whether nothing of it is to be changed."""
    index = tl.load(table + len(DTYPES) * tensors + tensor)
    return rows + tl.maximum(index, 0) * row_stride, (index < 0) | (tl.load(found_inf) != 0)


@triton.jit
def _floats(scratch, geometry, FIELD: tl.constexpr):
    return (scratch + tl.load(geometry + FIELD)).to(tl.pointer_type(tl.float32), bitcast=True)


@triton.jit
def _parts(geometry, index):
    """Of the units of an entry: their numbers, the rows of each, and which of these there are."""
    rows, parts = tl.load(geometry + ROWS), tl.load(geometry + PARTS)
    units = index.to(tl.int64) * UNITS + tl.arange(0, UNITS)
    row = (units % parts * PART)[:, None] + tl.arange(0, PART)[None, :]
    mask = (units < tl.load(geometry + BATCH) * parts)[:, None] & (row < rows)
    return units, (units // parts * rows)[:, None] + row, mask


@triton.jit
def _total(sums, stride, count, mask):
    """Of arrays `stride` apart, added in their order."""
    total = tl.load(sums, mask, other=0.0)
    together = 1 + (count - 1) // AHEAD * AHEAD
    for at in range(1, together, AHEAD):
        for i in tl.static_range(AHEAD):
            total += tl.load(sums + (at + i) * stride, mask, other=0.0)
    for at in range(together, count):
        total += tl.load(sums + at * stride, mask, other=0.0)
    return total


@triton.jit
def _arrays(table, tensor, tensors, start, DTYPES: tl.constexpr, ALONG: tl.constexpr):
    """Pointers to parameter, gradient and elementwise states, the same again for wide accesses, and bits that
    say whether these are allowed.
    """
    arrays = ()
    aligned = ()
    bits = start * 0
    for i in tl.static_range(len(DTYPES)):
        if i < 2 or ALONG == "none" or i >= 4:
            address = tl.load(table + i * tensors + tensor)
            array = address.to(tl.pointer_type(DTYPES[i])) + start
            bits = bits | array.to(tl.int64)
            arrays = arrays + (array,)
            aligned = aligned + (tl.multiple_of(array, 16),)
    return arrays, aligned, bits


@triton.jit
def _place(geometry, scratch, start, ALONG: tl.constexpr):
    """Where the element `start` is in its matrix, and what stands in the place of reduced states."""
    if ALONG == "none":
        return ()
    batch, rows, columns = (
        tl.load(geometry + BATCH),
        tl.load(geometry + ROWS),
        tl.load(geometry + COLUMNS),
    )
    of_rows, of_columns = _floats(scratch, geometry, OF_ROWS), _floats(scratch, geometry, OF_COLUMNS)
    return (of_rows, of_columns, start // columns, start % columns, batch, rows, columns)


@triton.jit
def _states(arrays, place, offsets, mask, ALONG: tl.constexpr):
    """A rule's states: what stands in the place of the reduced ones, then the elementwise ones."""
    states = ()
    if ALONG != "none":
        of_rows, of_columns, row, column, batch, rows, columns = place
        further = _wraps(offsets, column, columns)
        if ALONG != "columns":
            x = of_rows + (row + further)
            states = states + (tl.load(x, mask),)
            if ALONG == "rows":
                states = states + (tl.load(x + batch * rows, mask),)
        if ALONG != "rows":
            matrix = row // rows + _wraps(further, row % rows, rows)
            at = column + offsets - further.to(tl.int64) * columns
            y = of_columns + (matrix * columns + at)
            states = states + (tl.load(y, mask),)
            if ALONG == "columns":
                states = states + (tl.load(y + batch * columns, mask),)
    for i in tl.static_range(len(arrays) - 2):
        states = states + (load(arrays[2 + i] + offsets, mask),)
    return states


@triton.jit
def _wraps(offsets, first, period):
    """How often one comes to the next period, `offsets` on from `first` in one; for offsets below CHUNK.

    The quotient of numbers of 14 bits is less than 1/2 of the divisor's inverse away from what fp32 makes of
    it; half a step more and no rounding reaches the next whole number.
    """
    ahead = tl.minimum(period - first, CHUNK).to(tl.int32)
    inverse = tl.div_rn(1.0, tl.minimum(period, CHUNK).to(tl.float32))
    return tl.floor(((offsets - ahead).to(tl.float32) + 0.5) * inverse).to(tl.int32) + 1


@triton.jit
def _measured(
    arrays,
    aligned,
    full,
    left,
    place,
    factor,
    coefficients,
    MEASURE: tl.constexpr,
    TERMS: tl.constexpr,
    ALONG: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sums of the terms, in fp32 over the turns of a chunk, in float64 over all else."""
    first = tl.zeros((BLOCK,), tl.float64)
    second = tl.zeros((BLOCK,), tl.float64)
    for chunk in range(0, left, CHUNK):
        first32 = tl.zeros((BLOCK,), tl.float32)
        second32 = tl.zeros((BLOCK,), tl.float32)
        end = tl.minimum(chunk + CHUNK, full)
        for at in range(chunk, end, BLOCK):
            offsets = at + tl.arange(0, BLOCK)
            terms = _terms(aligned, offsets, None, place, factor, coefficients, MEASURE, ALONG)
            first32 += terms[0]
            if TERMS > 1:
                second32 += terms[1]
        for at in range(tl.maximum(chunk, end), tl.minimum(chunk + CHUNK, left), BLOCK):
            offsets = at + tl.arange(0, BLOCK)
            mask = offsets < left
            terms = _terms(arrays, offsets, mask, place, factor, coefficients, MEASURE, ALONG)
            first32 += tl.where(mask, terms[0], 0.0)
            if TERMS > 1:
                second32 += tl.where(mask, terms[1], 0.0)
        first += first32.to(tl.float64)
        second += second32.to(tl.float64)
    if TERMS > 1:
        return tl.sum(first, 0), tl.sum(second, 0)
    return (tl.sum(first, 0),)


@triton.jit
def _terms(arrays, offsets, mask, place, factor, coefficients, MEASURE: tl.constexpr, ALONG: tl.constexpr):
    p = load(arrays[0] + offsets, mask)
    g = load(arrays[1] + offsets, mask) * factor
    return MEASURE(p, g, _states(arrays, place, offsets, mask, ALONG), coefficients)


@triton.jit
def _stepped(
    arrays,
    aligned,
    full,
    left,
    place,
    factor,
    store_params,
    coefficients,
    factors,
    STEP: tl.constexpr,
    ALONG: tl.constexpr,
    BLOCK: tl.constexpr,
):
    for at in range(0, full, BLOCK):
        offsets = at + tl.arange(0, BLOCK)
        _update(aligned, offsets, None, place, factor, store_params, coefficients, factors, STEP, ALONG)
    for at in range(full, left, BLOCK):
        offsets = at + tl.arange(0, BLOCK)
        mask = offsets < left
        _update(arrays, offsets, mask, place, factor, store_params, coefficients, factors, STEP, ALONG)


@triton.jit
def _update(
    arrays,
    offsets,
    mask,
    place,
    factor,
    store_params,
    coefficients,
    factors,
    STEP: tl.constexpr,
    ALONG: tl.constexpr,
):
    p = load(arrays[0] + offsets, mask)
    g = load(arrays[1] + offsets, mask) * factor
    states = _states(arrays, place, offsets, mask, ALONG)
    if len(factors):
        amount, states = STEP(p, g, states, coefficients, factors)
    else:
        amount, states = STEP(p, g, states, coefficients)
    if store_params:
        store(arrays[0] + offsets, p - amount, mask)
    for i in tl.static_range(len(arrays) - 2):
        store(arrays[2 + i] + offsets, states[len(states) - (len(arrays) - 2) + i], mask)
