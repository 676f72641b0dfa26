"""Native CUDA kernels. An element-wise step over tensors of one kind is one launch, several hundred fit into
it; a rule that reduces takes some launches over all tensors, or over those that stay in the L2 cache.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Iterable, Sequence
from types import ModuleType
from typing import Any

import torch

from ..schedule import Launch, Reduction
from ..sharding import dtensor_type
from ..spec import ParamSpec
from ..step_rule import StepRule
from .gpu import GpuExecutor
from .native import exchange_api, refusal_of_tensors, why_missing
from .reducing import ReducingTensors, group_bytes, reducing_tensors
from .reducing_rounds import ReducingRounds

_NATIVE: ModuleType | None
try:
    import danlu._cuda as native  # as danlu._cpu in cpu.py

    _NATIVE = native
    _MISSING = ""
except ImportError as error:
    _NATIVE = None
    _MISSING = why_missing("_cuda", error, " (it is where nvcc is, see README)")


class Cuda:
    """The CUDA kernels of a native module, for tensors of one type of device."""

    name = "cuda"
    reason = "native kernels"
    # whether a pass of a rule that reduces may start while the one before it ends, on devices that can
    dependent_launches = os.environ.get("DANLU_OVERLAP") != "0"

    def __init__(self, native: ModuleType | None, missing: str = "", device_type: str = "cuda") -> None:
        self.native = native
        self.device_types: tuple[str, ...] = (device_type,)
        self._missing = missing

    def unavailable(self) -> str | None:
        if self.native is None:
            return self._missing
        reason: str | None = self.native.unavailable()
        return reason

    def refusal(self, spec: ParamSpec) -> str | None:
        device = spec.param.device
        if device.type not in self.device_types:
            return f"the parameter is on {device}, backend='cuda' takes CUDA tensors"
        if self.native is None:
            return self._missing
        if torch.version.hip is not None:
            return "this torch is built for ROCm"
        capability = _capability(self.native, self.index(device))
        if not _runs_on(self.native.architectures, capability):
            built = self.native.architectures
            return f"danlu._cuda is built for {built}, {device} has compute capability {capability / 10}"
        if self.native.coefficient_names(spec.rule) is None:
            return f"no CUDA rule {spec.rule!r}"
        if not self.native.has_kernel(spec.rule, spec.formats):
            refusal = f"no CUDA kernel for {'/'.join(spec.formats)} (parameter/gradient/states)"
            complete = self.native.combinations
            if complete == "all" or spec.rule in complete.split(","):
                return refusal
            return f"{refusal}; danlu._cuda is built with DANLU_CUDA_COMBINATIONS={complete}"
        return refusal_of_tensors(spec)

    def executor(self, optimizer: StepRule, specs: Sequence[ParamSpec]) -> CudaExecutor:
        return CudaExecutor(self, optimizer, specs)

    def reduction(self, rule: str) -> Reduction | None:
        """What a rule sums before its step; None if nothing."""
        assert self.native is not None
        found = self.native.reduction(rule)
        return None if found is None else Reduction(*found)

    def index(self, device: torch.device) -> int:
        return device.index or 0

    def stream(self, device: torch.device) -> int:
        """The handle of torch's current stream."""
        return int(torch.cuda.current_stream(device).cuda_stream)


class CudaExecutor(GpuExecutor):
    """Element-wise rules, whose tensors travel with their launches, and rules that reduce, which read
    tables in device memory.
    """

    def __init__(self, backend: Cuda, optimizer: StepRule, specs: Sequence[ParamSpec]) -> None:
        module, device = backend.native, specs[0].param.device
        assert module is not None
        index = backend.index(device) if device.type == "cuda" else -1
        self._native = module.Step(exchange_api(), torch, dtensor_type(), index, optimizer.counters_on_device)
        self._backend = backend
        super().__init__(self._native, module, optimizer, specs)
        self._reducing = reducing_tensors(specs, backend.reduction, group_bytes(device))
        self._module, self._index = module, index
        self._passes = []
        for _, tensors in self._reducing:
            launches = itertools.chain.from_iterable(tensors.schedule.groups)
            self._passes.append(self._pass_list(module, index, tensors, tensors.geometries, launches))
        self._selections = [self._native.select(indices) for indices, _ in self._reducing]
        count = 0 if self._max_norm is None else self._native.num_squares()
        self._squares = torch.empty(count, dtype=torch.float64, device=device)
        self.streams.keep(self._squares, *(t for _, tensors in self._reducing for t in tensors.tables))
        self._waits = _passes_wait(module.architectures, _capability(module, backend.index(device)))

    def launch(self) -> None:
        launches = 0
        if self._reducing:
            table = self.coefficient_table().data_ptr()
            addresses = [
                tensors.addresses.send(self._native.table(selection), capturing=self.is_capturing())
                for selection, (_, tensors) in zip(self._selections, self._reducing, strict=True)
            ]
            # what a capture makes of launches that start early has not been tried on a GPU
            dependent = self._backend.dependent_launches and self._waits and not self.is_capturing()
            for passes, sent in zip(self._passes, addresses, strict=True):
                passes.dependent = dependent
                launches = self._run(passes, sent, table, launches)
        self.launch_others(launches)

    def launch_others(self, launches: int = 0) -> None:
        table = 0 if self._on_device is None else self._on_device.table.data_ptr()
        zeros, stream = self._zeros.data_ptr(), self._backend.stream(self.device)
        clip, found_inf = self._clip_and_found_inf()
        self._native.run(self._coefficients, stream, table, clip, found_inf, self._idle, zeros, launches)

    def reduction(self, rule: str) -> Reduction | None:
        return self._backend.reduction(rule)

    def stages(self, rounds: ReducingRounds) -> list[Any]:
        def passes(launch: Launch, whole: bool) -> Any:
            geometries = rounds.whole if whole else rounds.geometries
            return self._pass_list(self._module, self._index, rounds.tensors, geometries, [launch])

        return [[passes(*one) for one in stage] for stage in rounds.stages]

    def run_stages(self, stages: Sequence[tuple[list[Any], torch.Tensor]]) -> None:
        table = self.coefficient_table().data_ptr()
        for passes, addresses in stages:
            for one in passes:
                self._run(one, addresses, table, 0)

    def sum_parts(self, rounds: ReducingRounds, which: int, addresses: torch.Tensor) -> None:
        tensors, sums = rounds.tensors, rounds.summations[which]
        self._module.sum_parts(
            *(tensors.name, self._index, self._backend.stream(self.device)),
            *(sums.table.data_ptr(), sums.places.data_ptr(), sums.blocks),
            *(tensors.scratch.data_ptr(), addresses.data_ptr(), len(rounds.indices), len(tensors.formats)),
        )

    def _run(self, passes: Any, addresses: torch.Tensor, table: int, launches: int) -> int:
        stream, (clip, found_inf) = self._backend.stream(self.device), self._clip_and_found_inf()
        made: int = passes.run(stream, addresses.data_ptr(), table, self._stride, clip, found_inf, launches)
        return made

    def _clip_and_found_inf(self) -> tuple[int, int]:
        """Their addresses."""
        clip, found_inf = self._clip, self._found_inf
        return (0 if clip is None else clip.data_ptr()), (0 if found_inf is None else found_inf.data_ptr())

    def enqueue_norm(self, result: torch.Tensor, grad_scale: torch.Tensor | None) -> None:
        assert self._max_norm is not None
        scale = 0 if grad_scale is None else grad_scale.data_ptr()
        stream = self._backend.stream(self.device)
        self._native.norm(stream, self._squares.data_ptr(), result.data_ptr(), self._max_norm, scale)

    @staticmethod
    def _pass_list(
        module: ModuleType,
        index: int,
        tensors: ReducingTensors,
        geometries: torch.Tensor,
        launches: Iterable[Launch],
    ) -> Any:
        places = geometries.data_ptr(), tensors.scratch.data_ptr()
        count = len(tensors.schedule.geometries)
        passes = module.PassList(tensors.rule, tensors.formats, tensors.name, index, count, *places)
        for launch in launches:
            blocks = tensors.maps.get(launch.kernel)
            halves = (0, 0) if blocks is None else (blocks[0].data_ptr(), blocks[1].data_ptr())
            passes.add(launch.kernel, launch.first, launch.count, launch.reverse, *halves)
        return passes


@functools.cache
def _capability(native: ModuleType, index: int) -> int:
    return int(native.capability(index))


def _runs_on(architectures: str, capability: int) -> bool:
    """Whether a binary for CMake's list of architectures has code for a device.

    Real code runs on its own major version, from its minor version on; PTX on everything newer.

    >>> _runs_on("80-real,90-real,100", 89), _runs_on("80-real,90-real,100", 120), _runs_on("90", 89)
    (True, True, False)
    """
    for name in architectures.split(","):
        number, _, kind = name.partition("-")
        digits = int(number.rstrip("af"))
        if kind != "virtual" and digits // 10 == capability // 10 and digits <= capability:
            return True
        if kind != "real" and number.isdigit() and digits <= capability:
            return True
    return False


def _passes_wait(architectures: str, capability: int) -> bool:
    """Whether the code that a device runs of a binary has the waits of csrc/cuda/dependent.cuh: that made for
    9.0 and newer has them, also where it is PTX.

    >>> _passes_wait("80-real,90-real,100", 90), _passes_wait("80-real,90-real,100", 120)
    (True, True)
    >>> _passes_wait("80-real,90-real,100", 89), _passes_wait("80,90-real", 100), _passes_wait("80", 90)
    (False, False, False)
    """
    newer = [name for name in architectures.split(",") if int(name.partition("-")[0].rstrip("af")) >= 90]
    return capability >= 90 and bool(newer) and _runs_on(",".join(newer), capability)


CUDA = Cuda(_NATIVE, _MISSING)
