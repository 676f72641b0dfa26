"""Launches of the Triton kernels of rules that reduce."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ..schedule import WARPS, Launch, Map
from .reducing import ReducingTensors


@dataclass
class _Call:
    """One launch: what it takes besides the arguments of all kernels."""

    kernel: Any
    geometries: torch.Tensor
    places: torch.Tensor
    launch: Launch
    constants: dict[str, Any]


class ReducingLaunches:
    """Tensors of one rule and one combination of formats, none of them empty.

    rule, formats: from danlu.triton_kernels.rules and formats; block: elements of a turn; options: of the
    compiler, none under the interpreter; passes: with their tables of geometries, None for all of a step.
    """

    def __init__(
        self,
        tensors: ReducingTensors,
        rule: Any,
        formats: tuple[Any, ...],
        block: int,
        options: dict[str, Any],
        passes: Iterable[tuple[Launch, torch.Tensor]] | None = None,
    ) -> None:
        self.tensors = tensors
        self.table = tensors.addresses
        self._scratch = tensors.scratch.view(torch.float64)
        self._constants = constants(rule, formats, block, options)
        if passes is None:
            launches = itertools.chain.from_iterable(tensors.schedule.groups)
            passes = [(launch, tensors.geometries) for launch in launches]
        self._calls = [call for launch, geometries in passes for call in self._call(launch, geometries)]

    @property
    def tables(self) -> list[torch.Tensor]:
        return [*self.tensors.tables, *(call.places for call in self._calls)]

    def compile(self, *arguments: Any) -> list[Any]:
        return [
            call.kernel.warmup(*self._all(call, *arguments), grid=(call.launch.count,), **call.constants)
            for call in self._calls
        ]

    def run(self, *arguments: Any) -> None:
        for call in self._calls:
            call.kernel[(call.launch.count,)](*self._all(call, *arguments), **call.constants)

    def _all(
        self,
        call: _Call,
        table: torch.Tensor,
        coefficients: torch.Tensor,
        clip: torch.Tensor,
        found_inf: torch.Tensor,
        stride: int,
    ) -> tuple[Any, ...]:
        tensors = self.tensors
        pointers = (table, call.geometries, call.places, self._scratch, coefficients, clip, found_inf)
        launch, work_items = call.launch, call.places.shape[1]
        numbers = (launch.first, launch.count, int(launch.reverse))
        return (*pointers, len(tensors.schedule.geometries), stride, work_items, *numbers)

    def _call(self, launch: Launch, geometries: torch.Tensor) -> Iterator[_Call]:
        if launch.kernel == "reduce_gradient":
            yield from self._reduce_gradient(launch, geometries)
        else:
            places = self.tensors.maps.get(launch.kernel, self.tensors.maps["apply"])
            yield _Call(_kernel(launch.kernel), geometries, places, launch, self._constants[launch.kernel])

    def _reduce_gradient(self, launch: Launch, geometries: torch.Tensor) -> Iterator[_Call]:
        """A launch for each width of tiles, which is a constant of the kernel."""
        schedule = self.tensors.schedule
        blocks = schedule.maps["reduce_gradient"]
        widths: dict[int, Map] = {}
        for at in range(launch.first, launch.first + launch.count):
            lanes = schedule.geometries[blocks.tensors[at]].lanes
            of_width = widths.setdefault(lanes, Map())
            of_width.tensors.append(blocks.tensors[at])
            of_width.indices.append(blocks.indices[at])
        for lanes, of_width in widths.items():
            table = [of_width.tensors, of_width.indices]
            places = torch.tensor(table, dtype=torch.int32, device=self.tensors.device)
            constants = {**self._constants["reduce_gradient"], "LANES": lanes}
            of_all = Launch("reduce_gradient", 0, len(of_width))
            yield _Call(_kernel("reduce_gradient"), geometries, places, of_all, constants)


def constants(rule: Any, formats: tuple[Any, ...], block: int, options: dict[str, Any]) -> dict[str, Any]:
    """What each kernel is compiled for; of reduce_gradient the number of lanes is missing."""
    reduction = rule.reduction
    common = dict(FORMATS=formats, COEFFICIENTS=len(rule.coefficients), **options)
    # of reduce_gradient and update_factors; of the others as many as the engine's
    wide = {**common, "num_warps": WARPS} if options else common
    # on its own ptxas stops at 64 or 80 registers, and spills some
    registers = dict(maxnreg=128) if options and torch.version.hip is None else {}
    along, turn = dict(ALONG=reduction.along), dict(BLOCK=block)
    sums = dict(TERMS=reduction.sums)
    return dict(
        reduce_gradient=dict(wide, STATISTIC=rule.statistic, **along, **registers),
        update_factors=dict(wide, AVERAGE=rule.average, COLUMN_FACTOR=rule.column_factor, **along),
        update_row_factors=dict(wide, AVERAGE=rule.average, ROW_FACTOR=rule.row_factor, **registers),
        reduce_norms=dict(
            common,
            NEEDS_NORMS=rule.needs_norms,
            NORMS_NEED_P=rule.norms_need_p,
            NORM_TERMS=rule.norm_terms,
            **sums,
            **along,
            **turn,
            **registers,
        ),
        finalize=dict(common, NEEDS_NORMS=rule.needs_norms, FINALIZE=rule.finalize, **sums),
        apply=dict(common, STEP=rule.function, SCALE_COUNT=rule.scales, **along, **turn, **registers),
        apply_by_row=dict(
            common, NORM_TERMS=rule.norm_terms, FINALIZE=rule.finalize, STEP=rule.function, **sums, **turn
        ),
    )


def _kernel(name: str) -> Any:
    from ..triton_kernels.reduce import KERNELS

    return KERNELS[name]
