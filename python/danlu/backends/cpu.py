"""Native kernels for CPU tensors: one parallel region over all tensors of all groups."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

import torch

from ..scale import StepScale
from ..sharding import dtensor_type
from ..spec import ParamSpec, Stop
from ..step_rule import StepRule
from .native import NativeExecutor, exchange_api, refusal_of_tensors, why_missing
from .stops import Array, TensorSums, whole_counts

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

    def refusal(self, spec: ParamSpec) -> str | None:
        p = spec.param
        if p.device.type != "cpu":
            return f"the parameter is on {p.device}, backend='cpu' takes CPU tensors"
        if _MISSING:
            return _MISSING
        if _cpu.coefficient_names(spec.rule) is None:
            return f"no native rule {spec.rule!r}"
        if any(name not in _cpu.formats for name in spec.formats):
            return f"no native kernel for {'/'.join(spec.formats)} (parameter/gradient/states)"
        return refusal_of_tensors(spec)

    def executor(self, optimizer: StepRule, specs: Sequence[ParamSpec]) -> CpuExecutor:
        return CpuExecutor(optimizer, specs)


class CpuExecutor(NativeExecutor):
    reads_host = True
    device = None

    def __init__(self, optimizer: StepRule, specs: Sequence[ParamSpec]) -> None:
        self._native = _cpu.Step(exchange_api(), torch, dtensor_type(), instruction_set())
        super().__init__(self._native, _cpu, optimizer, specs)
        self._coefficients: list[tuple[float, ...]] = []
        self._summed = {
            i: optimizer.summed_dims(optimizer.param_groups[spec.group], spec.whole)
            for i, spec in enumerate(specs)
            if spec.reduces
        }
        # of each tensor at each stop, as long as the scratch is where it was; rows, columns, elements of each
        self._sums: dict[int, dict[int, TensorSums]] = {}
        self._scratch = 0
        self._counts = {i: whole_counts(specs[i]) for i in self._summed}

    def gradient_squares(self) -> torch.Tensor | float:
        return self._native.gradient_squares(torch.get_num_threads())

    def prepare(self, optimizer: StepRule, scale: StepScale) -> None:
        self._coefficients = self.coefficients(optimizer, scale.factor)

    def run(self) -> None:
        self.count_writes(self.active())
        self._native.run(self._coefficients, torch.get_num_threads())

    def rounds(self) -> Iterator[Stop]:
        threads, active = torch.get_num_threads(), self.active()
        self.count_writes(active)
        self._native.reduce_gradient(self._coefficients, threads)
        yield from self._stop(0, active)
        self._native.reduce_norms(self._coefficients, threads)
        yield from self._stop(1, active)
        self._native.apply(threads)

    def _stop(self, which: int, active: Sequence[bool] | None) -> Iterator[Stop]:
        sums_of = self._sums_at(which)
        found = {i: sums.now() for i, sums in sums_of.items() if active is None or active[i]}
        if not found:
            return
        yield [(self._specs[i], sums) for i, sums in found.items()]
        for i, sums in found.items():
            if sums_of[i].take_counts(sums, self._counts[i]):
                self._native.count(i, *self._counts[i])

    def _sums_at(self, which: int) -> dict[int, TensorSums]:
        if self._scratch != self._native.scratch():
            self._sums.clear()
            self._scratch = self._native.scratch()
        if which not in self._sums:
            arrays = {i: self._arrays(i, which) for i in self._summed}
            self._sums[which] = {
                i: TensorSums(self._specs[i], self._summed[i], those) for i, those in arrays.items() if those
            }
        return self._sums[which]

    def _arrays(self, i: int, which: int) -> list[Array]:
        empty = torch.empty(0, dtype=torch.float64)
        return [
            (of, torch.frombuffer(values, dtype=torch.float64) if len(values) else empty)
            for of, values in self._native.sums(i, which)
        ]


CPU = Cpu()
