"""What the GPU backends share: coefficients from the host, or counters and coefficients on the device."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from .. import capture, checks
from ..listed_rows import ListedRows, in_order, nonzero_rows, summed
from ..scale import StepScale
from ..schedule import Reduction
from ..spec import ParamSpec, Stop
from ..step_rule import StepRule
from .device_coefficients import DeviceCoefficients
from .native import HEADER_FLOATS, CoefficientNames, NativeExecutor
from .reducing_rounds import STAGES, ReducingRounds, reducing_rounds
from .staged_table import StagedTable
from .streams import Streams

if TYPE_CHECKING:
    from .._step_list import SelectingList


class GpuExecutor(NativeExecutor):
    """The parameters of one device, up to their launches.

    A lazy parameter is launched as runs of its rows, each with addresses of its own, which the host makes: a
    step with one waits for the device.
    """

    finds_rows = False

    def __init__(
        self,
        native: SelectingList,
        rules: CoefficientNames,
        optimizer: StepRule,
        specs: Sequence[ParamSpec],
    ) -> None:
        from .. import _cpu

        super().__init__(native, rules, optimizer, specs)
        self._selecting = native
        self._stride = HEADER_FLOATS + max(len(names or ()) for names in self._names.values())
        self.device = specs[0].param.device
        on_device = optimizer.counters_on_device
        # of lazy parameters whose other rows' moments move: how far behind a coefficients that of these is
        self._idle = 0
        self._has_idle = any(spec.sparse_mode == "params" for spec in specs)
        self._zeros = torch.zeros(
            _cpu.num_zeros if self._has_idle else 0, dtype=torch.float32, device=self.device
        )
        self._on_device = (
            DeviceCoefficients(self.checked_names, specs, self._stride, idle=self._has_idle)
            if on_device
            else None
        )
        self._coefficients: list[tuple[float, ...]] = []
        self._summed = {
            i: optimizer.summed_dims(optimizer.param_groups[spec.group], spec.whole)
            for i, spec in enumerate(specs)
            if spec.reduces
        }
        # with the native list's number of its tensors, and what launches each stage
        self._rounds: list[tuple[ReducingRounds, int, list[Any]]] | None = None
        self._max_norm = optimizer.max_grad_norm
        # of the last norm: its squares, and behind them in float32 the factor
        self._norm = torch.empty(2, dtype=torch.float64, device=self.device)
        self.streams = Streams(self.device)
        self.streams.keep(self._zeros, self._norm)
        if self._on_device is not None:
            self.streams.keep(*self._on_device.tables)
        # tensors that the kernels read, kept until the next step
        self._clip: torch.Tensor | None = None
        self._found_inf: torch.Tensor | None = None

    @property
    def reads_host(self) -> bool:
        return self._on_device is None

    def refresh(self, optimizer: StepRule) -> bool:
        self.streams.enter()
        if self._on_device is None and self.is_capturing():
            raise RuntimeError("a step inside a CUDA graph's capture needs capturable=True")
        return super().refresh(optimizer)

    def release(self) -> None:
        self.streams.leave()
        super().release()

    def prepare(self, optimizer: StepRule, scale: StepScale) -> None:
        self._clip, self._found_inf = scale.clip, scale.found_inf
        if self._on_device is not None:
            self._on_device.prepare(optimizer, self._found_inf)
            self._idle = len(self._specs)
            return
        self._coefficients = self.coefficients(optimizer, scale.factor)
        self._idle = len(self._coefficients)
        if self._has_idle:
            self._coefficients += [
                (factor, 0.0, *coefficients) for factor, _, *coefficients in self._coefficients
            ]

    def rows_of(self, spec: ParamSpec, g: torch.Tensor) -> ListedRows:
        """Of a dense gradient too: a launch takes the addresses of rows from the host."""
        checks.waits_for_rows(spec.name, self.device)
        if g.layout == torch.strided:
            rows = (nonzero_rows(g) if spec.rows is None else spec.rows).cpu()
            return ListedRows(rows, g.detach(), rows, None)
        checks.listed_rows(spec.name, spec.param, g)
        rows = g._indices()[0].cpu()
        checks.row_numbers(spec.name, spec.param, rows)
        listed = in_order(rows, g._values().detach().contiguous())
        return listed if listed.offsets is None else ListedRows(*summed(listed), None, None)

    def gradient_squares(self) -> torch.Tensor | float:
        self.enqueue_norm(self._norm, None)
        return self._norm[0]

    def clip_factor(self, grad_scale: torch.Tensor | None) -> torch.Tensor | None:
        self.enqueue_norm(self._norm, grad_scale)
        return self._norm.view(torch.float32)[2]

    def run(self) -> None:
        active = self.active()
        self.count_writes(active)
        self.captured = self.captured or self.is_capturing()
        self.launch()
        if self._on_device is not None:
            self._on_device.advance(active)

    def rounds(self) -> Iterator[Stop]:
        """As `Executor.rounds`; the host does not wait for the device."""
        active = self.active()
        self.count_writes(active)
        if self._rounds is None:
            made = reducing_rounds(self._specs, self._summed, self.reduction)
            self._rounds = [(one, self._selecting.select(one.indices), self.stages(one)) for one in made]
            self.streams.keep(*(t for one, *_ in self._rounds for t in one.tables))
        members = []
        for one, selection, stages in self._rounds:
            table = one.tensors.addresses.send(
                self._selecting.table(selection), capturing=self.is_capturing()
            )
            members.append((one, stages, table))
            one.begin()
        for which in range(STAGES - 1):
            self.run_stages([(stages[which], table) for _, stages, table in members])
            for one, _, table in members:
                if one.summations[which].blocks:
                    self.sum_parts(one, which, table)
            found = dict(itertools.chain(*(one.stop(which, active) for one, *_ in members)))
            if found:
                yield [(self._specs[i], found[i]) for i in sorted(found)]
            for one, *_ in members:
                one.go_on(which)
        self.run_stages([(stages[-1], table) for _, stages, table in members])
        self.launch_others()
        if self._on_device is not None:
            self._on_device.advance(active)

    def reduction(self, rule: str) -> Reduction | None:
        """What a rule sums before its step; None if nothing."""
        raise NotImplementedError

    def stages(self, rounds: ReducingRounds) -> list[Any]:
        """What `run_stages` takes for each stage."""
        raise NotImplementedError

    def run_stages(self, stages: Sequence[tuple[Any, torch.Tensor]]) -> None:
        """Enqueues a stage, with its tables of addresses."""
        raise NotImplementedError

    def sum_parts(self, rounds: ReducingRounds, which: int, addresses: torch.Tensor) -> None:
        """Enqueues what a stop adds up."""
        raise NotImplementedError

    def launch_others(self) -> None:
        """As `launch`, without tensors whose rule reduces."""
        raise NotImplementedError

    def launch(self) -> None:
        """Enqueues the kernels, and counts the step where the counters are on the host."""
        raise NotImplementedError

    def enqueue_norm(self, result: torch.Tensor, grad_scale: torch.Tensor | None) -> None:
        """Writes the squares of all gradients, float64, and behind them the factor that unscales and clips,
        float32. grad_scale: float32 on the device, None for 1.
        """
        raise NotImplementedError

    def coefficient_table(self) -> torch.Tensor:
        """The coefficients in the device's memory, fp32."""
        if self._on_device is not None:
            return self._on_device.table
        from .. import _cpu

        return self._staged_coefficients.send(
            _cpu.rounded_coefficients(self._coefficients, self._stride)
        ).view(torch.float32)

    @functools.cached_property
    def _staged_coefficients(self) -> StagedTable:
        staged = StagedTable(4 * self._stride * (1 + self._has_idle) * len(self._specs), self.device)
        self.streams.keep(staged.table)
        return staged

    def is_capturing(self) -> bool:
        return capture.is_capturing(self.device)
