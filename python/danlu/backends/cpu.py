"""Native kernels for CPU tensors: one parallel region over all tensors of all groups."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from .. import checks, state
from ..sharding import dtensor_type, local

if TYPE_CHECKING:
    from ..optimizer import FusedOptimizer
    from ..plan import Entry

try:
    from .. import _cpu

    _MISSING = None
except ImportError as error:
    _MISSING = f"danlu._cpu cannot be imported ({error})"

STORED = ("float32", "bfloat16", "float16")


def instruction_set() -> str:
    """The one in use: the best that this machine has, or the value of DANLU_CPU_ISA."""
    return os.environ.get("DANLU_CPU_ISA") or _cpu.instruction_sets()[0]


class Cpu:
    name = "cpu"
    reason = "native kernels"
    device_types: tuple[str, ...] = ("cpu",)

    def unavailable(self) -> str | None:
        return _MISSING

    def refusal(self, entry: Entry) -> str | None:
        p = entry.param
        if p.device.type != "cpu":
            return f"the parameter is on {p.device}, backend='cpu' takes CPU tensors"
        if _MISSING:
            return _MISSING
        if _cpu.coefficient_names(entry.rule) is None:
            return f"no native rule {entry.rule!r}"
        if any(dtype not in STORED for dtype in entry.dtypes):
            return f"no native kernel for {'/'.join(entry.dtypes)} (parameter/gradient/states)"
        if type(local(p)).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
            return f"the parameter is a {type(local(p)).__name__}"
        if local(p).is_neg():
            return "the parameter is a lazily negated view"
        if not checks.is_dense(local(p)):
            return f"the parameter is not dense (shape {entry.shape}, strides {entry.strides})"
        for name in entry.state_names:
            if name in state.COUNTERS and name in entry.state and entry.state[name].ndim:
                return f"state {name!r} has shape {tuple(entry.state[name].shape)}"
        for what, t in _companions(entry):
            if type(local(t)) is not torch.Tensor:
                return f"the {what} is a {type(local(t)).__name__}"
            if local(t).is_neg():
                return f"the {what} is a lazily negated view"
            if not _same_strides(local(p), local(t)):
                return f"the {what} has strides {local(t).stride()}, the parameter has {entry.strides}"
        return None

    def part(self, optimizer: FusedOptimizer, entries: Sequence[Entry]) -> CpuPart:
        return CpuPart(optimizer, entries)


class CpuPart:
    """A native list of parameters, which borrows every object: the entries here keep them alive."""

    def __init__(self, optimizer: FusedOptimizer, entries: Sequence[Entry]) -> None:
        self._entries = entries
        self._params = [entry.param for entry in entries]
        self._keys = list(optimizer.state)
        self._kinds = {entry.group: (entry.rule, entry.cycle) for entry in entries}
        self._native = _cpu.Step(_exchange_api(), torch, dtensor_type(), instruction_set())
        for entry in entries:
            self._native.add(entry)
        self._native.bind(optimizer.state)
        self._row_keys: list[tuple[int, float, float]] = []
        self._rows: list[tuple[float, ...]] = []

    def gather(self, optimizer: FusedOptimizer) -> bool:
        for index, kind in self._kinds.items():
            group = optimizer.param_groups[index]
            if kind != (optimizer.rule(group), optimizer.cycle(group)):
                return False
        keys = self._native.gather(optimizer.state)
        if keys is None:
            return False
        self._row_keys = keys
        return True

    def prepare(self, optimizer: FusedOptimizer, factor: float) -> None:
        self._rows = [self._row(optimizer, factor, *key) for key in self._row_keys]

    def run(self) -> None:
        active = self._params
        if self._native.active() != len(active):
            active = [p for p, has_gradient in zip(active, self._native.mask(), strict=True) if has_gradient]
        torch.autograd.graph.increment_version(active)
        self._native.run(self._rows, torch.get_num_threads())

    def release(self) -> None:
        self._native.release()

    def _row(
        self, optimizer: FusedOptimizer, factor: float, index: int, step: float, micro_step: float
    ) -> tuple[float, ...]:
        group = optimizer.param_groups[index]
        rule, cycle = self._kinds[index]
        values = optimizer.fold(group, step, micro_step)
        names = _cpu.coefficient_names(rule)
        if tuple(values) != names:
            raise RuntimeError(f"rule {rule!r} takes the coefficients {names}, Python gives {tuple(values)}")
        store_params = float(group["lr"]) != 0 and micro_step + 1 >= cycle
        return (-factor if group["maximize"] else factor, float(store_params), *values.values())


def _companions(entry: Entry) -> Iterator[tuple[str, torch.Tensor]]:
    """What must look like the parameter: its gradient and its states, as far as there are any."""
    if entry.param.grad is not None:
        yield "gradient", entry.param.grad
    for name in entry.state_names:
        if name in entry.state and name not in state.COUNTERS:
            yield f"state {name!r}", entry.state[name]


def _same_strides(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors of one shape put their elements in the same order."""
    if a.numel() == 0:
        return True
    dims = zip(a.shape, a.stride(), b.stride(), strict=True)
    return all(size == 1 or stride == other for size, stride, other in dims)


def _exchange_api() -> object:
    """DLPack's C exchange API where torch has it; DANLU_DLPACK=0 turns it off."""
    if os.environ.get("DANLU_DLPACK") == "0":
        return None
    return getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)


CPU = Cpu()
