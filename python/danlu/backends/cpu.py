"""Native kernels for CPU tensors: one parallel region over all tensors of all groups."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

from ..scale import StepScale
from ..sharding import dtensor_type
from ..spec import ParamSpec
from ..step_rule import StepRule
from .native import STORED, NativeExecutor, exchange_api, refusal_of_tensors, why_missing

try:
    # not `from .. import`, whose error says that the package may import itself, whatever is wrong
    import danlu._cpu as _cpu

    _MISSING = None
except ImportError as error:
    _MISSING = why_missing("_cpu", error)


def instruction_set() -> str:
    """The one in use: the best that this machine has, or the value of DANLU_CPU_ISA."""
    return os.environ.get("DANLU_CPU_ISA") or _cpu.instruction_sets()[0]


class Cpu:
    name = "cpu"
    reason = "native kernels"
    device_types: tuple[str, ...] = ("cpu",)

    def unavailable(self) -> str | None:
        return _MISSING

    def refusal(self, entry: ParamSpec) -> str | None:
        p = entry.param
        if p.device.type != "cpu":
            return f"the parameter is on {p.device}, backend='cpu' takes CPU tensors"
        if _MISSING:
            return _MISSING
        if _cpu.coefficient_names(entry.rule) is None:
            return f"no native rule {entry.rule!r}"
        if any(dtype not in STORED for dtype in entry.dtypes):
            return f"no native kernel for {'/'.join(entry.dtypes)} (parameter/gradient/states)"
        return refusal_of_tensors(entry)

    def executor(self, optimizer: StepRule, entries: Sequence[ParamSpec]) -> CpuExecutor:
        return CpuExecutor(optimizer, entries)


class CpuExecutor(NativeExecutor):
    reads_host = True
    device = None

    def __init__(self, optimizer: StepRule, entries: Sequence[ParamSpec]) -> None:
        self._native = _cpu.Step(exchange_api(), torch, dtensor_type(), instruction_set())
        super().__init__(self._native, _cpu, optimizer, entries)
        self._sharded = any(entry.sharded for entry in entries)
        self._rows: list[tuple[float, ...]] = []

    def gradient_squares(self) -> torch.Tensor | float:
        if self._sharded:  # needs the other ranks
            return super().gradient_squares()
        return self._native.gradient_squares(torch.get_num_threads())

    def prepare(self, optimizer: StepRule, scale: StepScale) -> None:
        self._rows = self.rows(optimizer, scale.factor)

    def run(self) -> None:
        self.count_writes(self.active())
        self._native.run(self._rows, torch.get_num_threads())


CPU = Cpu()
