"""Tensors of a rule that reduces on a GPU, in a step that stops where sums are complete.

One launch, `sum_parts`, makes sums of tensors of the sums of tiles and chunks. They stand one behind the
other in the scratch. The passes behind a stop read these in place of those: by a second table of geometries,
in which each tensor has one tile and one chunk of sums, which may be of a larger tensor.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..partial_sums import PartialSums, SummedDims
from ..schedule import FIELDS, SUMMATION_FIELDS, Geometry, Launch, Map, Reduction, Room, Summation
from ..spec import ParamSpec
from .reducing import ReducingTensors
from .stops import Array, TensorSums, whole_counts

# what the sums behind a stop are of: rows, columns, elements
SUMMED = ("summed_rows", "summed_columns", "summed_size")
# at the first stop, at the second; what comes behind the last
STAGES = 3


class Pass(NamedTuple):
    launch: Launch
    whole: bool  # whether it reads what stands behind a stop


@dataclass
class _Sums:
    """Of one kind, of one tensor."""

    of: str
    total: torch.Tensor
    summation: Summation | None  # of what it is made; None: it is there


class Summations:
    """What `sum_parts` adds up at a stop, in tables on the device. `table`: int64 [summations][fields];
    `places`: int32 [2][blocks], of each block the summation, and which of its blocks it is.
    """

    def __init__(self, found: Sequence[Summation], device: torch.device) -> None:
        blocks = Map()
        for i, one in enumerate(found):
            blocks.add(i, one.blocks)
        self.blocks = len(blocks)
        self.table = _table(found, SUMMATION_FIELDS).to(device)
        self.places = torch.tensor([blocks.tensors, blocks.indices], dtype=torch.int32, device=device)


class ReducingRounds:
    """indices: of the specs in their plan's executor, also of those without elements, which may have states
    and stop as all do; summed: the dimensions of each.
    """

    def __init__(
        self,
        reduction: Reduction,
        indices: Sequence[int],
        specs: Sequence[ParamSpec],
        summed: Sequence[SummedDims],
    ) -> None:
        self.indices = indices
        self.tensors = ReducingTensors(reduction, specs, math.inf)
        schedule = self.tensors.schedule
        room = Room(schedule.scratch_bytes // 8)
        pairs = [_stopping(g, reduction, room) for g in schedule.geometries]
        self.tensors.scratch = torch.zeros(room.taken, dtype=torch.float64, device=self.tensors.device)
        self.geometries = _table([first for first, _ in pairs], FIELDS).to(self.tensors.device)
        self._host = _table([whole for _, whole in pairs], FIELDS)
        self.whole = self._host.to(self.tensors.device, copy=True)
        self.stages = _stages(schedule.groups[0] if schedule.groups else [], reduction)
        self._sums = [
            [self._sums_at(stop, reduction, k, *pair) for k, pair in enumerate(pairs)]
            for stop in range(STAGES - 1)
        ]
        self._counts = [whole_counts(spec) for spec in specs]
        self._at = [
            [
                TensorSums(spec, dims, _arrays(found))
                for spec, dims, found in zip(specs, summed, at, strict=True)
            ]
            for at in self._sums
        ]
        # of each stop
        self.summations = [
            Summations([s.summation for found in sums for s in found if s.summation], self.tensors.device)
            for sums in self._sums
        ]
        self._found: dict[int, list[PartialSums]] = {}  # of a stop

    @property
    def tables(self) -> list[torch.Tensor]:
        of_stops = [t for sums in self.summations for t in (sums.table, sums.places)]
        return [*self.tensors.tables, self.geometries, self.whole, *of_stops]

    def begin(self) -> None:
        """A pass that a rule's coefficients do without leaves zeros."""
        self.tensors.scratch.zero_()

    def stop(self, which: int, active: Sequence[bool] | None) -> Iterator[tuple[int, list[PartialSums]]]:
        """What stands at a stop for the tensors that take part, with their indices, once it is added up."""
        self._found = {}
        for k, found in enumerate(self._sums[which]):
            if not found or not (active is None or active[self.indices[k]]):
                continue
            self._found[k] = self._at[which][k].now()
            yield self.indices[k], self._found[k]

    def go_on(self, which: int) -> None:
        """Takes what the sums are of by now."""
        changed = [
            k for k, found in self._found.items() if self._at[which][k].take_counts(found, self._counts[k])
        ]
        for k in changed:
            for field, count in zip(SUMMED, self._counts[k], strict=True):
                self._host[k, FIELDS.index(field)] = count
        if changed:
            self.whole.copy_(self._host)

    def _sums_at(
        self, stop: int, reduction: Reduction, tensor: int, first: Geometry, whole: Geometry
    ) -> list[_Sums]:
        statistics = reduction.along != "none"
        if statistics and stop == 0:
            return list(self._statistics(reduction.along, tensor, first, whole))
        if stop != int(statistics):
            return []
        if reduction.row_by_row:
            count = first.batch * first.rows * reduction.sums
            return [_Sums("row", self._view(whole.row_norms, (count,)), None)]
        totals = self._view(whole.sums, (reduction.sums,))
        of_chunks = Summation.of(
            whole.sums, first.sums, reduction.sums, parts=first.chunks, stride=reduction.sums
        )
        # all in one summation
        return [_Sums("tensor", totals[j : j + 1], None if j else of_chunks) for j in range(reduction.sums)]

    def _statistics(self, along: str, tensor: int, first: Geometry, whole: Geometry) -> Iterator[_Sums]:
        batch, rows, columns = first.batch, first.rows, first.columns
        if along != "columns":
            of_tiles = Summation.of(
                whole.row_sums, first.row_sums, batch * rows, parts=first.column_tiles, stride=batch * rows
            )
            yield _Sums("rows", self._view(whole.row_sums, (batch * rows,)), of_tiles)
        if along != "rows":
            of_tiles = Summation.of(
                whole.column_sums,
                first.column_sums,
                batch * columns,
                run=columns,
                run_stride=first.row_tiles * columns,
                parts=first.row_tiles,
                stride=columns,
            )
            yield _Sums("columns", self._view(whole.column_sums, (batch, columns)), of_tiles)
        if along == "both":
            matrices = dict(run=1, run_stride=rows, parts=rows, stride=1)
            of_rows = Summation.of(
                whole.matrix_sums,
                first.row_sums,
                batch,
                **matrices,
                times=first.column_tiles,
                times_stride=batch * rows,
            )
            yield _Sums("both", self._view(whole.matrix_sums, (batch,)), of_rows)
            averages = Summation.of(whole.average_sums, 0, batch, **matrices, tensor=tensor)
            yield _Sums("averages", self._view(whole.average_sums, (batch,)), averages)

    def _view(self, place: int, shape: tuple[int, ...]) -> torch.Tensor:
        return self.tensors.scratch[place : place + math.prod(shape)].view(shape)


def reducing_rounds(
    specs: Sequence[ParamSpec],
    summed: dict[int, SummedDims],
    reduction: Callable[[str], Reduction | None],
) -> list[ReducingRounds]:
    """Of the specs whose rules reduce: those of one rule and one combination of dtypes together."""
    alike: dict[tuple[str, tuple[str, ...]], list[int]] = {}
    for i in summed:
        alike.setdefault((specs[i].rule, specs[i].formats), []).append(i)
    found = []
    for (rule, _), indices in alike.items():
        sums = reduction(rule)
        if sums is None:  # this rule of the optimizer's takes each element by itself
            continue
        found.append(ReducingRounds(sums, indices, [specs[i] for i in indices], [summed[i] for i in indices]))
    return found


def _stages(launches: Sequence[Launch], reduction: Reduction) -> list[list[Pass]]:
    """The passes up to each stop, and those behind the last."""
    found: list[list[Pass]] = [[] for _ in range(STAGES)]
    for launch in launches:
        if launch.count == 0:  # of tensors without elements
            continue
        match launch.kernel:
            case "reduce_gradient":
                found[0].append(Pass(launch, False))
            case "update_factors" | "update_row_factors":
                found[1].append(Pass(launch, True))
            case "reduce_norms":
                found[reduction.along != "none"].append(Pass(launch, False))
            case "apply_by_row":
                found[0].append(Pass(launch, False))
                found[2].append(Pass(launch, True))
            case _:
                found[2].append(Pass(launch, True))
    return found


def _stopping(g: Geometry, reduction: Reduction, room: Room) -> tuple[Geometry, Geometry]:
    """A tensor in front of a stop and behind it."""
    if reduction.row_by_row:
        norms = room.take(g.batch * g.rows * reduction.sums)
        return tuple(dataclasses.replace(g, row_norms=norms, half=half) for half in (1, 2))  # type: ignore[return-value]
    along_rows, along_columns = (reduction.along in (kind, "both") for kind in ("rows", "columns"))
    both = reduction.along == "both"
    whole = dataclasses.replace(
        g,
        row_tiles=1,
        column_tiles=1,
        chunks=1,
        row_sums=room.take(along_rows * g.batch * g.rows),
        column_sums=room.take(along_columns * g.batch * g.columns),
        sums=room.take(reduction.sums),
        matrix_sums=room.take(both * g.batch),
        average_sums=room.take(both * g.batch),
    )
    return g, whole


def _table(found: Sequence[Geometry | Summation], fields: Sequence[str]) -> torch.Tensor:
    rows = [[getattr(one, field) for field in fields] for one in found]
    return torch.tensor(rows, dtype=torch.int64).view(-1, len(fields))


def _arrays(found: Sequence[_Sums]) -> list[Array]:
    return [(sums.of, sums.total) for sums in found]
