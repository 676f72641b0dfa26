"""How the passes of rules that reduce are cut: every element once, no sum in another's place."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from danlu.backends.reducing import group_bytes
from danlu.schedule import (
    CHUNK_SIZE,
    COLUMNS_OF_BLOCK,
    FIELDS,
    ROWS_OF_PART,
    SUMMATION_FIELDS,
    WARPS,
    Geometry,
    Launch,
    Reduction,
    Schedule,
)
from emulated import Emulated

Matrix = tuple[int, int, int]
MATRICES: list[Matrix] = [
    (1, 1, 1),
    (1, 1, 140_000),
    (1, 140_000, 1),
    (1, 7, 300),
    (1, 9, 300),
    (3, 65, 257),
    (1, 2048, 8192),
    (500, 3, 3),
    (2, 5000, 16),
    (1, 16, 5000),
    (1, 70_000, 24),
]
REDUCTIONS = [
    Reduction(along, sums)
    for along, sums in itertools.product(("none", "rows", "columns", "both"), (0, 2))
    if (along, sums) != ("none", 0)
]
every_matrix = pytest.mark.parametrize("matrix", MATRICES, ids=str)
every_reduction = pytest.mark.parametrize("reduction", REDUCTIONS, ids=lambda r: f"{r.along}-{r.sums}")


def arrays(g: Geometry, reduction: Reduction) -> Iterator[tuple[int, int]]:
    """Where each array lies in the scratch, in bytes from its start to its end."""
    rows, columns, along = g.batch * g.rows, g.batch * g.columns, reduction.along
    lengths = {
        "row_sums": 8 * rows * g.column_tiles * (along in ("rows", "both")),
        "column_sums": 8 * columns * g.row_tiles * (along in ("columns", "both")),
        "part_sums": 8 * g.batch * g.parts * (along == "both"),
        "row_factors": 4 * rows * reduction.row_factors,
        "column_factors": 4 * columns * reduction.column_factors,
        "sums": 8 * -(-g.size // CHUNK_SIZE) * reduction.sums,
        "scales": 16 * (reduction.sums > 0),
    }
    for name, length in lengths.items():
        start = 8 * getattr(g, name)
        assert start % 16 == 0
        yield start, start + length


@every_reduction
def test_no_array_lies_in_another(reduction: Reduction) -> None:
    schedule = Schedule(MATRICES, reduction, 4)
    assert len(schedule.groups) == 1
    places = sorted(
        place for g in schedule.geometries for place in arrays(g, reduction) if place[0] < place[1]
    )
    for (_, end), (start, _) in itertools.pairwise(places):
        assert end <= start
    assert places[-1][1] <= schedule.scratch_bytes <= sum(b - a + 16 for a, b in places) + 16 * len(MATRICES)


@every_matrix
@every_reduction
def test_tiles_cover_a_matrix(reduction: Reduction, matrix: Matrix) -> None:
    schedule = Schedule([matrix], reduction, 2)
    (g,) = schedule.geometries
    batch, rows, columns = matrix
    assert (g.size, g.batch, g.rows, g.columns) == (math.prod(matrix), batch, rows, columns)
    assert (g.row_tiles - 1) * g.tile_rows < rows <= g.row_tiles * g.tile_rows
    assert (g.column_tiles - 1) * g.tile_columns < columns <= g.column_tiles * g.tile_columns
    assert (g.parts - 1) * ROWS_OF_PART < rows <= g.parts * ROWS_OF_PART
    assert g.lanes in (1, 2, 4, 8, 16, 32)
    assert g.tile_columns % (8 * g.lanes) == 0
    assert g.tile_rows % (8 * g.warps * 32 // g.lanes) == 0
    # what one thread adds up in fp32
    assert g.tile_rows // (g.warps * 32 // g.lanes) <= 4096
    assert 8 * (g.tile_columns // (8 * g.lanes)) <= 4096
    if reduction.along in ("columns", "both"):
        assert g.tile_columns == 8 * g.lanes  # a thread has the sums of eight columns
    blocks = {kernel: len(found) for kernel, found in schedule.maps.items()}
    assert blocks["apply"] == -(-g.size // CHUNK_SIZE)
    if reduction.along == "none":
        assert blocks["reduce_gradient"] == blocks["update_factors"] == blocks["update_row_factors"] == 0
        return
    tiles = g.batch * g.row_tiles * g.column_tiles
    assert blocks["reduce_gradient"] == (tiles if g.warps == WARPS else -(-tiles // WARPS))
    of_rows = -(-batch * g.parts // WARPS) * (reduction.along != "columns")
    of_columns = -(-batch * columns // COLUMNS_OF_BLOCK) * (reduction.along != "rows")
    assert blocks["update_factors"] == of_rows + of_columns
    assert blocks["update_row_factors"] == (of_rows if reduction.along == "both" else 0)


@every_reduction
def test_launches_take_every_block_once(reduction: Reduction) -> None:
    schedule = Schedule(MATRICES * 3, reduction, 4, group_bytes=3e5)
    assert (len(schedule.groups) > 3) == (reduction.along != "none")
    for kernel, found in schedule.maps.items():
        launches = [one for one in itertools.chain(*schedule.groups) if one.kernel == kernel]
        assert sum(one.count for one in launches) == len(found)
        assert [one.first for one in launches] == [0, *itertools.accumulate(one.count for one in launches)][
            :-1
        ]
        blocks = list(zip(found.tensors, found.indices, strict=True))
        assert len(set(blocks)) == len(blocks)
        assert blocks == sorted(blocks)
    finalized = [one for one in itertools.chain(*schedule.groups) if one.kernel == "finalize"]
    assert sum(one.count for one in finalized) == (len(MATRICES) * 3 if reduction.sums else 0)


def test_groups_stay_in_the_cache() -> None:
    matrices = [(1, 1000, 1000), (1, 1000, 500), (1, 1000, 501), (1, 3000, 3000), (1, 10, 10)]
    schedule = Schedule(matrices, Reduction("both", 2), 4, group_bytes=6e6)
    sizes = [[schedule.geometries[t].size for t in tensors_of(schedule, group)] for group in schedule.groups]
    assert sizes == [[1_000_000, 500_000], [501_000], [9_000_000], [100]]
    assert len(Schedule(matrices, Reduction("none", 2), 4, group_bytes=6e6).groups) == 1


def tensors_of(schedule: Schedule, group: list[Launch]) -> list[int]:
    step = group[-1]
    return sorted(set(schedule.maps["apply"].tensors[step.first : step.first + step.count]))


def test_each_pass_begins_where_the_last_one_ended() -> None:
    def order(reduction: Reduction) -> list[tuple[str, bool]]:
        (group,) = Schedule([(1, 30, 40)], reduction, 4).groups
        return [
            (one.kernel, one.reverse)
            for one in group
            if one.kernel in ("reduce_gradient", "reduce_norms", "apply")
        ]

    assert order(Reduction("both", 2)) == [
        ("reduce_gradient", False),
        ("reduce_norms", True),
        ("apply", False),
    ]
    assert order(Reduction("rows", 0)) == [("reduce_gradient", False), ("apply", True)]
    assert order(Reduction("none", 2)) == [("reduce_norms", False), ("apply", True)]


def test_sums_are_a_small_part_of_a_large_tensor() -> None:
    """Bytes for each element of what an 8B model has."""
    for matrix in ((1, 4096, 4096), (1, 14336, 4096), (1, 4096, 14336), (1, 128256, 4096)):
        schedule = Schedule([matrix], Reduction("both", 2), 2)
        assert schedule.scratch_bytes < 0.18 * math.prod(matrix)


def test_rows_by_themselves() -> None:
    schedule = Schedule([(1, 100, 7), (1, 1, 3)], Reduction("none", 1, row_by_row=True), 4)
    assert schedule.groups == [[Launch("apply_by_row", 0, 14)]]


def test_kernels_read_these_fields(cuda: Emulated) -> None:
    assert cuda.native.geometry_fields == FIELDS
    assert cuda.native.summation_fields == SUMMATION_FIELDS


@pytest.mark.parametrize(
    ("l2_megabytes", "clock", "bits", "grouped"),
    [
        pytest.param(50, 2_619_000, 5120, False, id="H100"),  # 3.4 TB/s
        pytest.param(40, 1_593_000, 5120, False, id="A100"),  # 2.0 TB/s
        pytest.param(72, 10_501_000, 384, True, id="RTX 4090"),  # 1.0 TB/s
        pytest.param(48, 6_251_000, 192, True, id="L4"),  # 0.3 TB/s
        pytest.param(50, 0, 0, False, id="unknown"),
    ],
)
def test_groups_where_the_cache_is_large_for_its_memory(
    l2_megabytes: int, clock: int, bits: int, grouped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    properties = SimpleNamespace(
        L2_cache_size=l2_megabytes << 20, memory_clock_rate=clock, memory_bus_width=bits
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert group_bytes(torch.device("cuda", 0)) == (l2_megabytes << 19 if grouped else 2**30)
    assert group_bytes(torch.device("cpu")) == math.inf
