"""Tensors of a rule that reduces on a GPU, in a step that stops where sums are complete.

The sums of tiles and chunks become sums of tensors, which stand one behind the other in the scratch. The
passes behind a stop read these in place of those: by a second table of geometries, in which each tensor has
one tile and one chunk of sums, which may be of a larger tensor.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..partial_sums import PartialSums, SummedDims
from ..schedule import FIELDS, Geometry, Launch, Reduction, Room
from ..sharding import local
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
    parts: torch.Tensor | None  # what is added up over the first dimension; None: the total is there
    total: torch.Tensor


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
        self.geometries = _table([first for first, _ in pairs]).to(self.tensors.device)
        self._host = _table([whole for _, whole in pairs])
        self.whole = self._host.to(self.tensors.device, copy=True)
        self.stages = _stages(schedule.groups[0] if schedule.groups else [], reduction)
        self._sums = [
            [self._sums_at(stop, reduction, spec, *pair) for spec, pair in zip(specs, pairs, strict=True)]
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
        self._found: dict[int, list[PartialSums]] = {}  # of a stop

    @property
    def tables(self) -> list[torch.Tensor]:
        return [*self.tensors.tables, self.geometries, self.whole]

    def begin(self) -> None:
        """A pass that a rule's coefficients do without leaves zeros."""
        self.tensors.scratch.zero_()

    def stop(self, which: int, active: Sequence[bool] | None) -> Iterator[tuple[int, list[PartialSums]]]:
        """What stands at a stop for the tensors that take part, with their indices."""
        self._found = {}
        for k, found in enumerate(self._sums[which]):
            if not found or not (active is None or active[self.indices[k]]):
                continue
            for sums in found:
                if sums.parts is not None:
                    torch.sum(sums.parts, 0, dtype=torch.float64, out=sums.total)
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
        self, stop: int, reduction: Reduction, spec: ParamSpec, first: Geometry, whole: Geometry
    ) -> list[_Sums]:
        statistics = reduction.along != "none"
        if statistics and stop == 0:
            return list(self._statistics(reduction.along, spec, first, whole))
        if stop != int(statistics):
            return []
        if reduction.row_by_row:
            count = first.batch * first.rows * reduction.sums
            return [_Sums("row", None, self._view(whole.row_norms, (count,)))]
        parts = self._view(first.sums, (first.chunks, reduction.sums))
        totals = self._view(whole.sums, (reduction.sums,))
        return [_Sums("tensor", parts[:, j : j + 1], totals[j : j + 1]) for j in range(reduction.sums)]

    def _statistics(self, along: str, spec: ParamSpec, first: Geometry, whole: Geometry) -> Iterator[_Sums]:
        rows = first.batch * first.rows
        if along != "columns":
            total = self._view(whole.row_sums, (rows,))
            yield _Sums("rows", self._view(first.row_sums, (first.column_tiles, rows)), total)
        if along != "rows":
            of_tiles = self._view(first.column_sums, (first.batch, first.row_tiles, first.columns))
            to = self._view(whole.column_sums, (first.batch, first.columns))
            yield _Sums("columns", of_tiles.transpose(0, 1), to)
        if along == "both":
            matrices = total.view(first.batch, first.rows).T
            yield _Sums("both", matrices, self._view(whole.matrix_sums, (first.batch,)))
            averages = local(spec.state[spec.state_names[0]]).view(first.batch, first.rows).T
            yield _Sums("averages", averages, self._view(whole.average_sums, (first.batch,)))

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


def _table(geometries: Sequence[Geometry]) -> torch.Tensor:
    rows = [[getattr(g, field) for field in FIELDS] for g in geometries]
    return torch.tensor(rows, dtype=torch.int64).view(-1, len(FIELDS))


def _arrays(found: Sequence[_Sums]) -> list[Array]:
    return [(sums.of, sums.total) for sums in found]
