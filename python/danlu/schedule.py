"""How GPU kernels divide the work of rules that reduce: tiles, partial sums, launches. CUDA's kernels and
Triton's follow the same schedule.

Passes over elements take chunks of a tensor, whatever its shape. Statistics of the gradient are summed over
tiles of its matrices, a thread having eight neighbouring columns, a tile one warp or eight. All passes go
over a group of tensors whose gradients stay in the L2 cache before the next group's, which reuse the scratch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

CHUNK_SIZE = 16384  # elements of a block in a pass over elements
COLUMNS_OF_LANE = 8
ROWS_OF_LANE = 8  # whose sums it has at once
LANES, WARPS = 32, 8
ROWS_OF_PART = 256  # of a matrix, averaged by one warp
COLUMNS_OF_BLOCK = 256  # of all matrices of a tensor, averaged by one block
SUMMING_THREADS = 256  # of a block that adds up what tiles and chunks have left
NEIGHBOURS = 32  # sums whose parts are read together, where there are many parts
SCALES = 4  # fp32 numbers at most that a tensor's sums become
MOST_BATCHES = 8  # of rows in a tile: more leave fewer sums of columns
WANTED_ROW_TILES = 128
ELEMENTS_OF_WARP = 16384  # where a tile may be long


@dataclass(frozen=True)
class Reduction:
    """What a rule sums before its step."""

    along: str  # "rows", "columns" or "both", "none": statistics of the gradient
    sums: int  # over whole tensors
    row_by_row: bool = False  # over each row in place of the tensor, by the block that updates it

    @property
    def row_factors(self) -> int:
        """Arrays that stand in the place of states along rows."""
        return {"rows": 2, "both": 1}.get(self.along, 0)

    @property
    def column_factors(self) -> int:
        return {"columns": 2, "both": 1}.get(self.along, 0)


@dataclass(frozen=True)
class Geometry:
    """One tensor as the kernels see it: `batch` matrices, and where its sums are, in float64 numbers from the
    start of the scratch. The kernels read these fields as int64, in this order.
    """

    size: int
    batch: int
    rows: int
    columns: int
    lanes: int  # of a warp, side by side along a row
    warps: int  # of a tile
    tile_rows: int
    tile_columns: int
    row_tiles: int
    column_tiles: int
    parts: int  # of a matrix's rows
    row_sums: int  # float64 [column_tiles][batch * rows]
    column_sums: int  # float64 [batch][row_tiles][columns]
    part_sums: int  # float64 [batch][parts]
    row_factors: int  # fp32, one or two arrays of batch * rows
    column_factors: int  # fp32, one or two arrays of batch * columns
    sums: int  # float64 [chunks][sums]
    scales: int  # fp32
    chunks: int  # that have left sums
    # what the sums are of: this tensor, or the larger one of which it is a part
    summed_rows: int
    summed_columns: int
    summed_size: int
    # float64, where a step stops: sums over matrices of the statistic, of row averages before they move
    # [batch]; of each row by itself [batch * rows][sums]
    matrix_sums: int
    average_sums: int
    row_norms: int
    half: int  # of apply_by_row: 1 leaves row_norms, 2 takes them, 0 is both without

    @property
    def tiles(self) -> int:
        return self.batch * self.row_tiles * self.column_tiles

    @property
    def row_blocks(self) -> int:
        """Of update_factors and update_row_factors: those in front of the blocks that average columns."""
        return _divided_up(self.batch * self.parts, WARPS)


FIELDS = tuple(field.name for field in dataclasses.fields(Geometry))


@dataclass(frozen=True)
class Summation:
    """Where a step stops: sums of one kind of one tensor, each of parts at equal distances, `times` over.
    Those of sum `k` begin at `first + k // run * run_stride + k % run`. The kernels read these fields as
    int64, in this order.
    """

    to: int  # where the sums come to stand one behind the other, in float64 numbers from the scratch's start
    tensor: int  # whose first state has the parts, fp32; -1: the scratch has them, float64
    first: int  # in numbers of that kind
    sums: int
    run: int
    run_stride: int
    parts: int
    stride: int
    times: int
    times_stride: int
    together: int  # sums of a block, whose threads share the parts of each

    @classmethod
    def of(
        cls,
        to: int,
        first: int,
        sums: int,
        *,
        parts: int,
        stride: int,
        run: int | None = None,
        run_stride: int = 0,
        times: int = 1,
        times_stride: int = 0,
        tensor: int = -1,
    ) -> Summation:
        """run: None for all."""
        run = max(sums, 1) if run is None else run
        count = parts * times
        if count < NEIGHBOURS:
            together = SUMMING_THREADS
        elif sums >= NEIGHBOURS and (run >= NEIGHBOURS or count < SUMMING_THREADS):
            together = NEIGHBOURS
        else:
            together = 1
        return cls(to, tensor, first, sums, run, run_stride, parts, stride, times, times_stride, together)

    @property
    def blocks(self) -> int:
        return _divided_up(self.sums, self.together)


SUMMATION_FIELDS = tuple(field.name for field in dataclasses.fields(Summation))


@dataclass(frozen=True)
class Launch:
    """One launch of a pass: `count` blocks of its map from `first` on; of finalize, tensors."""

    kernel: str  # the pass
    first: int
    count: int
    reverse: bool = False  # the last block first, to begin at what the pass before left in the cache


class Map:
    """What the blocks of a pass work on: the tensor, and which of its chunks, tiles, ..."""

    def __init__(self) -> None:
        self.tensors: list[int] = []
        self.indices: list[int] = []

    def add(self, tensor: int, count: int) -> None:
        self.tensors += [tensor] * count
        self.indices += range(count)

    def __len__(self) -> int:
        return len(self.tensors)


class Schedule:
    """Of the tensors of one rule and one combination of dtypes.

    matrices: (batch, rows, columns) of each. group_bytes: of gradients that shall stay in
    the L2 cache; a rule without statistics of the gradient has one group. The passes, in their order:

        reduce_gradient     tiles     sums of the statistic along rows and columns
        update_factors      averages  from these the reduced states and their factors; not those of rows
                                      where columns are averaged, too
        update_row_factors  parts     these, which need the mean over a matrix
        reduce_norms        chunks    sums over whole tensors
        finalize                      from these each tensor's step scales
        apply               chunks    new parameters and states
        apply_by_row        rows      reduce_norms, finalize and apply of each row by itself
    """

    def __init__(
        self,
        matrices: Sequence[tuple[int, int, int]],
        reduction: Reduction,
        gradient_itemsize: int,
        group_bytes: float = math.inf,
    ) -> None:
        self.reduction = reduction
        self.maps = {
            kernel: Map()
            for kernel in ("reduce_gradient", "update_factors", "update_row_factors", "apply", "apply_by_row")
        }
        self.geometries: list[Geometry] = []
        self.groups: list[list[Launch]] = []
        self.scratch_bytes = 0
        limit = math.inf if reduction.along == "none" else group_bytes / gradient_itemsize
        for members in _grouped(matrices, limit):
            self._add(members)

    def _add(self, members: Sequence[tuple[int, int, int]]) -> None:
        before = {kernel: len(blocks) for kernel, blocks in self.maps.items()}
        first = len(self.geometries)
        room = Room()
        for matrix in members:
            self._add_blocks(_geometry(matrix, self.reduction, room))
        self.scratch_bytes = max(self.scratch_bytes, 8 * room.taken)

        def launch(kernel: str, reverse: bool = False) -> Launch:
            of = "apply" if kernel == "reduce_norms" else kernel
            return Launch(kernel, before[of], len(self.maps[of]) - before[of], reverse)

        launches = []
        if self.reduction.row_by_row:
            launches = [launch("apply_by_row")]
        else:
            back = False
            if self.reduction.along != "none":
                launches += [launch("reduce_gradient"), launch("update_factors")]
                launches += [launch("update_row_factors")] if self.reduction.along == "both" else []
                back = True
            if self.reduction.sums:
                launches += [launch("reduce_norms", back), Launch("finalize", first, len(members))]
                back = not back
            launches.append(launch("apply", back))
        self.groups.append(launches)

    def _add_blocks(self, g: Geometry) -> None:
        tensor, along, maps = len(self.geometries), self.reduction.along, self.maps
        self.geometries.append(g)
        if self.reduction.row_by_row:
            maps["apply_by_row"].add(tensor, _divided_up(g.batch * g.rows, WARPS))
            return
        maps["apply"].add(tensor, g.chunks)
        if along == "none":
            return
        maps["reduce_gradient"].add(tensor, _divided_up(g.tiles * g.warps, WARPS))
        of_rows = 0 if along == "columns" else g.row_blocks
        of_columns = 0 if along == "rows" else _divided_up(g.batch * g.columns, COLUMNS_OF_BLOCK)
        maps["update_factors"].add(tensor, of_rows + of_columns)
        if along == "both":
            maps["update_row_factors"].add(tensor, of_rows)


class Room:
    """Places of arrays one behind the other, each at a multiple of 16 bytes."""

    def __init__(self, taken: int = 0) -> None:
        self.taken = taken  # in float64 numbers

    def take(self, count: int, itemsize: int = 8) -> int:
        place = self.taken
        self.taken += 2 * _divided_up(count * itemsize, 16)
        return place


def _geometry(matrix: tuple[int, int, int], reduction: Reduction, room: Room) -> Geometry:
    batch, rows, columns = matrix
    lanes = min(LANES, _power_of_two(_divided_up(columns, COLUMNS_OF_LANE)))
    rows_of_warp = ROWS_OF_LANE * LANES // lanes
    warps = 1 if rows <= rows_of_warp else WARPS
    tile_rows, tile_columns = rows_of_warp * warps, lanes * COLUMNS_OF_LANE
    if warps == WARPS:
        tile_rows *= min(MOST_BATCHES, _divided_up(_divided_up(rows, tile_rows), WANTED_ROW_TILES))
    if reduction.along == "rows":
        turns = ELEMENTS_OF_WARP // (min(max(rows, 1), ROWS_OF_LANE) * tile_columns)
        tile_columns *= max(1, min(turns, _divided_up(columns, tile_columns)))
    row_tiles, column_tiles = _divided_up(rows, tile_rows), _divided_up(columns, tile_columns)
    parts = _divided_up(rows, ROWS_OF_PART)
    along_rows, along_columns = (reduction.along in (kind, "both") for kind in ("rows", "columns"))
    size = batch * rows * columns
    sums = 0 if reduction.row_by_row else reduction.sums
    chunks = _divided_up(size, CHUNK_SIZE)
    return Geometry(
        size=size,
        batch=batch,
        rows=rows,
        columns=columns,
        lanes=lanes,
        warps=warps,
        tile_rows=tile_rows,
        tile_columns=tile_columns,
        row_tiles=row_tiles,
        column_tiles=column_tiles,
        parts=parts,
        row_sums=room.take(along_rows * batch * rows * column_tiles),
        column_sums=room.take(along_columns * batch * row_tiles * columns),
        part_sums=room.take((reduction.along == "both") * batch * parts),
        row_factors=room.take(reduction.row_factors * batch * rows, 4),
        column_factors=room.take(reduction.column_factors * batch * columns, 4),
        sums=room.take(sums * chunks),
        scales=room.take(SCALES if sums else 0, 4),
        chunks=chunks,
        summed_rows=rows,
        summed_columns=columns,
        summed_size=size,
        matrix_sums=0,
        average_sums=0,
        row_norms=0,
        half=0,
    )


def _grouped(
    matrices: Sequence[tuple[int, int, int]], limit: float
) -> Iterator[Sequence[tuple[int, int, int]]]:
    """Neighbours of up to `limit` elements together; a larger one alone."""
    first, elements = 0, 0
    for i, matrix in enumerate(matrices):
        size = math.prod(matrix)
        if i > first and elements + size > limit:
            yield matrices[first:i]
            first, elements = i, 0
        elements += size
    if matrices:
        yield matrices[first:]


def _divided_up(a: int, b: int) -> int:
    return -(-a // b)


def _power_of_two(x: int) -> int:
    """The next one that is not less."""
    return 1 << (x - 1).bit_length()
