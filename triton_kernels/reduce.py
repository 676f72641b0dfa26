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
LINES = tl.constexpr(2 * schedule.ROWS_OF_LANE * schedule.LANES)  # rows of a turn, if it were one lane wide
PART = tl.constexpr(schedule.ROWS_OF_PART)
COLUMN_BLOCK = tl.constexpr(schedule.COLUMNS_OF_BLOCK)
CHUNK = tl.constexpr(schedule.CHUNK_SIZE)
EIGHT = tl.constexpr(8)  # neighbours, of 16 bits each in a wide access
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
    states = (
        tl.load(table + 2 * tensors + tensor).to(tl.pointer_type(DTYPES[2])),
        tl.load(table + 3 * tensors + tensor).to(tl.pointer_type(DTYPES[3])),
    )
    if ALONG == "columns":
        _average_columns(states, geometry, scratch, index, coefficients, AVERAGE, ALONG_COLUMNS, ALONG)
    elif ALONG == "rows":
        _average_rows(states, geometry, scratch, index, coefficients, AVERAGE, ALONG)
    else:
        row_blocks = tl.cdiv(tl.load(geometry + BATCH) * tl.load(geometry + PARTS), UNITS)
        if index < row_blocks:
            _average_rows(states, geometry, scratch, index, coefficients, AVERAGE, ALONG)
        else:
            block = index - row_blocks
            _average_columns(states, geometry, scratch, block, coefficients, AVERAGE, ALONG_COLUMNS, ALONG)


@triton.jit
def _average_rows(states, geometry, scratch, index, coefficients, AVERAGE: tl.constexpr, ALONG: tl.constexpr):
    batch, rows = tl.load(geometry + BATCH), tl.load(geometry + ROWS)
    units, at, mask = _parts(geometry, index)
    sums = scratch + tl.load(geometry + ROW_SUMS) + at
    total = _total(sums, batch * rows, tl.load(geometry + COLUMN_TILES), mask, 4)
    mean = total / tl.load(geometry + COLUMNS).to(tl.float64)
    if ALONG == "both":
        v = AVERAGE(load(states[0] + at, mask), mean, coefficients)
        store(states[0] + at, v, mask)
        part_sums = scratch + tl.load(geometry + PART_SUMS) + units
        existing = units < batch * tl.load(geometry + PARTS)
        tl.store(part_sums, tl.sum(tl.where(mask, v, 0.0).to(tl.float64), 1), existing)
    else:
        instead = _floats(scratch, geometry, OF_ROWS)
        _average_pair(states, at, mask, mean, instead, batch * rows, coefficients, AVERAGE)


@triton.jit
def _average_columns(
    states,
    geometry,
    scratch,
    index,
    coefficients,
    AVERAGE: tl.constexpr,
    ALONG_COLUMNS: tl.constexpr,
    ALONG: tl.constexpr,
):
    batch, columns = tl.load(geometry + BATCH), tl.load(geometry + COLUMNS)
    row_tiles = tl.load(geometry + ROW_TILES)
    at = index.to(tl.int64) * COLUMN_BLOCK + tl.arange(0, COLUMN_BLOCK)
    mask = at < batch * columns
    of_matrix = at // columns * row_tiles * columns
    sums = scratch + tl.load(geometry + COLUMN_SUMS) + of_matrix + at % columns
    mean = _total(sums, columns, row_tiles, mask, 8) / tl.load(geometry + ROWS).to(tl.float64)
    instead = _floats(scratch, geometry, OF_COLUMNS)
    if ALONG == "both":
        v = AVERAGE(load(states[1] + at, mask), mean, coefficients)
        store(states[1] + at, v, mask)
        tl.store(instead + at, ALONG_COLUMNS(v, coefficients), mask)
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
    MEASURES_P: tl.constexpr,
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
        ends = _ends(bits, left, geometry, ALONG, BLOCK)
        place = _place(geometry, scratch, start, ALONG)
        with_p = tl.full((), True, tl.int1)
        if MEASURES_P is not None:
            with_p = MEASURES_P(coefficients)
        totals = _measured(
            arrays, aligned, ends, place, factor, coefficients, with_p, MEASURE, TERMS, ALONG, BLOCK
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
    ends = _ends(bits, left, geometry, ALONG, BLOCK)
    place = _place(geometry, scratch, start, ALONG)
    _stepped(arrays, aligned, ends, place, factor, store_params, coefficients, factors, STEP, ALONG, BLOCK)


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
        total = tl.full((), 0.0, tl.float64)
        for at in range(0, columns, CHUNK):
            arrays, aligned, bits = _arrays(table, tensor, tensors, r * columns + at, DTYPES, "none")
            ends = _ends(bits, tl.minimum(columns - at, CHUNK).to(tl.int32), geometry, "none", BLOCK)
            with_p = tl.full((), True, tl.int1)
            totals = _measured(
                arrays, aligned, ends, (), factor, coefficients, with_p, MEASURE, TERMS, "none", BLOCK
            )
            total += totals[0]
        factors = SETTLE((total,), columns, coefficients)
        arrays, aligned, bits = _arrays(table, tensor, tensors, r * columns, DTYPES, "none")
        ends = _ends(bits, columns, geometry, "none", BLOCK)
        _stepped(arrays, aligned, ends, (), factor, store_params, coefficients, factors, STEP, "none", BLOCK)


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
    place = (scratch + tl.load(geometry + FIELD)).to(tl.pointer_type(tl.float32), bitcast=True)
    return tl.multiple_of(place, 16)


@triton.jit
def _parts(geometry, index):
    """Of the units of an entry: their numbers, the rows of each, and which of these there are."""
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
def _ends(bits, left, geometry, ALONG: tl.constexpr, BLOCK: tl.constexpr):
    """Of a chunk's loops: wide accesses to all arrays, the columns' too; to all but these; with a mask."""
    full = tl.where(bits % 16 == 0, left // BLOCK * BLOCK, 0)
    even = full * 0
    if ALONG != "none":
        even = tl.where(tl.load(geometry + COLUMNS) % EIGHT == 0, full, 0)
    return even, full, left


@triton.jit
def _place(geometry, scratch, start, ALONG: tl.constexpr):
    """Where the element `start` is in its matrix, and what stands in the place of reduced states."""
    place = ()
    if ALONG != "none":
        batch, rows, columns = (
            tl.load(geometry + BATCH),
            tl.load(geometry + ROWS),
            tl.load(geometry + COLUMNS),
        )
        of_rows, of_columns = _floats(scratch, geometry, OF_ROWS), _floats(scratch, geometry, OF_COLUMNS)
        place = (of_rows, of_columns, start // columns, start % columns, batch, rows, columns)
    return place


@triton.jit
def _states(arrays, place, offsets, mask, ALONG: tl.constexpr, EVEN: tl.constexpr):
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
            at += matrix * columns
            second = of_columns + batch * columns
            if EVEN:
                at = tl.max_contiguous(tl.multiple_of(at, EIGHT), EIGHT)
                second = tl.multiple_of(second, 16)
            states = states + (tl.load(of_columns + at, mask),)
            if ALONG == "columns":
                states = states + (tl.load(second + at, mask),)
    for i in tl.static_range(len(arrays) - 2):
        states = states + (load(arrays[2 + i] + offsets, mask),)
    return states


@triton.jit
def _wraps(offsets, first, period):
    """How often one comes to the next period, `offsets` on from `first` in one; for offsets below CHUNK.

    fp32's quotient of such numbers is off by far less than 1/2 of the divisor's inverse: with half an element
    more no rounding reaches the next whole number.
    """
    ahead = tl.minimum(period - first, CHUNK).to(tl.int32)
    divisor = tl.minimum(period, CHUNK).to(tl.int32)
    inverse = tl.div_rn(1.0, divisor.to(tl.float32))
    return (((offsets - ahead + divisor).to(tl.float32) + 0.5) * inverse).to(tl.int32)


@triton.jit
def _measured(
    arrays,
    aligned,
    ends,
    place,
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
            terms = _terms(aligned, offsets, None, place, factor, coefficients, with_p, MEASURE, ALONG, True)
            first += terms[0]
            if TERMS > 1:
                second += terms[1]
    for at in range(even, full, BLOCK):
        offsets = at + tl.arange(0, BLOCK)
        terms = _terms(aligned, offsets, None, place, factor, coefficients, with_p, MEASURE, ALONG, False)
        first += terms[0]
        if TERMS > 1:
            second += terms[1]
    for at in range(full, left, BLOCK):
        offsets = at + tl.arange(0, BLOCK)
        mask = offsets < left
        terms = _terms(arrays, offsets, mask, place, factor, coefficients, with_p, MEASURE, ALONG, False)
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
    place,
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
    return MEASURE(p, g, _states(arrays, place, offsets, mask, ALONG, EVEN), coefficients)


@triton.jit
def _stepped(
    arrays,
    aligned,
    ends,
    place,
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
            _update(aligned, offsets, None, place, numbers, STEP, ALONG, True)
    for at in range(even, full, BLOCK):
        offsets = at + tl.arange(0, BLOCK)
        _update(aligned, offsets, None, place, numbers, STEP, ALONG, False)
    for at in range(full, left, BLOCK):
        offsets = at + tl.arange(0, BLOCK)
        _update(arrays, offsets, offsets < left, place, numbers, STEP, ALONG, False)


@triton.jit
def _update(
    arrays,
    offsets,
    mask,
    place,
    numbers,
    STEP: tl.constexpr,
    ALONG: tl.constexpr,
    EVEN: tl.constexpr,
):
    factor, store_params, coefficients, factors = numbers
    p = load(arrays[0] + offsets, mask)
    g = load(arrays[1] + offsets, mask) * factor
    states = _states(arrays, place, offsets, mask, ALONG, EVEN)
    if len(factors):
        amount, states = STEP(p, g, states, coefficients, factors)
    else:
        amount, states = STEP(p, g, states, coefficients)
    if store_params:
        store(arrays[0] + offsets, p - amount, mask)
    for i in tl.static_range(len(arrays) - 2):
        store(arrays[2 + i] + offsets, states[len(states) - (len(arrays) - 2) + i], mask)
