"""Triton kernels, for every combination of formats and on every GPU that Triton knows."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import math
import os
from collections.abc import Sequence
from typing import Any

import torch

from .. import formats
from ..schedule import Launch, Reduction
from ..sharding import dtensor_type
from ..spec import ParamSpec
from ..step_rule import StepRule
from .cpu import CPU
from .gpu import GpuExecutor
from .native import exchange_api, refusal_of_tensors
from .reducing import ReducingTensors, group_bytes
from .reducing_rounds import ReducingRounds
from .staged_table import StagedTable
from .triton_loading import load
from .triton_norm import ChunkMap, GradientNorm
from .triton_reduce import ReducingLaunches

OLDEST = (3, 5)
MOST_STATES = 4
# DLPack's numbers
_CPU, _CUDA, _ROCM = 1, 2, 10


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, over CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


class Triton:
    name = "triton"
    reason = "Triton kernels"

    @property
    def device_types(self) -> tuple[str, ...]:
        return ("cpu",) if interpreted() else ("cuda",)

    def unavailable(self) -> str | None:
        return _missing() or (
            None
            if interpreted() or torch.cuda.is_available()
            else "there is no GPU; TRITON_INTERPRET=1 runs the kernels over CPU tensors, slowly"
        )

    def refusal(self, spec: ParamSpec) -> str | None:
        device = spec.param.device
        if device.type not in self.device_types:
            wanted = "CPU tensors under TRITON_INTERPRET=1" if interpreted() else "tensors on a GPU"
            return f"the parameter is on {device}, backend='triton' takes {wanted}"
        missing = _missing()
        if missing:
            return missing
        if self.coefficient_names(spec.rule) is None:
            return f"no Triton rule {spec.rule!r}"
        if any(name not in _formats() for name in spec.formats):
            return f"no Triton kernel for {'/'.join(spec.formats)} (parameter/gradient/states)"
        if len(spec.formats) - 2 > MOST_STATES:
            return f"{len(spec.formats) - 2} states, at most {MOST_STATES} are taken"
        return refusal_of_tensors(spec)

    def coefficient_names(self, rule: str) -> tuple[str, ...] | None:
        found = _rule(rule)
        return None if found is None else found.coefficients

    def executor(self, optimizer: StepRule, specs: Sequence[ParamSpec]) -> TritonExecutor:
        return TritonExecutor(self, optimizer, specs)


class TritonExecutor(GpuExecutor):
    """The parameters of one device: one launch for each combination of rule and dtypes."""

    def __init__(self, backend: Triton, optimizer: StepRule, specs: Sequence[ParamSpec]) -> None:
        from .. import _cpu

        device = specs[0].param.device
        kind = _CPU if device.type == "cpu" else _ROCM if torch.version.hip else _CUDA
        place = (kind, device.index or 0)
        on_device = optimizer.counters_on_device
        self._native = _cpu.AddressList(exchange_api(), torch, dtensor_type(), place, on_device)
        super().__init__(self._native, backend, optimizer, specs)
        alike: dict[tuple[str, tuple[str, ...], bool], list[int]] = {}
        for i, spec in enumerate(specs):
            if math.prod(spec.shape):
                alike.setdefault((spec.rule, spec.formats, spec.sparse_mode is not None), []).append(i)
        self.launches = [_launches([specs[i] for i in indices]) for indices in alike.values()]
        self._selections = [self._native.select(indices) for indices in alike.values()]
        self._gradient_norm = None
        if self._max_norm is not None:
            self._gradient_norm = GradientNorm(
                self._native,
                specs,
                self._max_norm,
                _engine().CHUNK_SIZE,
                lambda name: _formats()[name].types[0],
                lambda name: _block_size((name,), device),
                _options(),
            )
        self._one = torch.ones((), device=device)
        self._zero = torch.zeros((), device=device)
        self.streams.keep(self._one, self._zero, *(t for launch in self.launches for t in launch.tables))
        if self._gradient_norm is not None:
            self.streams.keep(*self._gradient_norm.tables)
        self._loaded = interpreted()

    def launch(self) -> None:
        self._launch_all(list(zip(self.launches, self._selections, strict=True)))

    def launch_others(self) -> None:
        pairs = zip(self.launches, self._selections, strict=True)
        self._launch_all([pair for pair in pairs if not isinstance(pair[0], ReducingLaunches)])

    def reduction(self, rule: str) -> Reduction | None:
        found: Reduction | None = _rule(rule).reduction
        return found

    def stages(self, rounds: ReducingRounds) -> list[Any]:
        spec = self._specs[rounds.indices[0]]
        return [
            _reducing_launches(
                rounds.tensors,
                spec,
                [(launch, rounds.whole if whole else rounds.geometries) for launch, whole in stage],
            )
            for stage in rounds.stages
        ]

    def run_stages(self, stages: Sequence[tuple[ReducingLaunches, torch.Tensor]]) -> None:
        numbers = self._numbers()
        with self._current_device():
            for launches, addresses in stages:
                launches.run(addresses.view(torch.int64), *numbers)

    def sum_parts(self, rounds: ReducingRounds, which: int, addresses: torch.Tensor) -> None:
        from ..triton_kernels.reduce.sum_parts import sum_parts

        sums, table = rounds.summations[which], addresses.view(torch.int64)
        numbers = len(rounds.indices), sums.blocks, len(rounds.tensors.formats)
        with self._current_device():
            sum_parts[(sums.blocks,)](
                table, sums.table, sums.places, rounds.tensors.scratch, *numbers, **_options()
            )

    def _numbers(self) -> tuple[Any, ...]:
        """Coefficients, clip, found_inf, and the stride of the first."""
        clip = self._one if self._clip is None else self._clip
        found_inf = self._zero if self._found_inf is None else self._found_inf
        return self.coefficient_table(), clip, found_inf, self._stride

    def _launch_all(self, pairs: Sequence[tuple[Any, int]]) -> None:
        capturing = self.is_capturing()
        numbers = self._numbers()
        with self._current_device():
            calls = []
            for launch, selection in pairs:
                if isinstance(launch, _LazyLaunch):
                    zeros = self._zeros.data_ptr()
                    tables = self._native.lazy_table(selection, launch.chunk, self._idle, zeros)
                    table = launch.send(*tables)
                else:
                    sent = launch.table.send(self._native.table(selection), capturing=capturing)
                    table = sent.view(torch.int64)
                calls.append((launch, (table, *numbers)))
            # all before the first runs, so that none can fail when others have run
            if not self._loaded:
                load(
                    [kernel for launch, arguments in calls for kernel in launch.compile(*arguments)],
                    capturing=capturing,
                )
                self._loaded = True
            for launch, arguments in calls:
                launch.run(*arguments)
        self._native.advance()

    def enqueue_norm(self, result: torch.Tensor, grad_scale: torch.Tensor | None) -> None:
        assert self._gradient_norm is not None
        with self._current_device():
            self._gradient_norm.enqueue(result, grad_scale, capturing=self.is_capturing())

    def _current_device(self) -> torch.cuda.device:
        return torch.cuda.device(self.device if self.device.type == "cuda" else -1)


def _launches(specs: Sequence[ParamSpec]) -> _Launch | _LazyLaunch | ReducingLaunches:
    """Of specs of one rule and one combination of formats, all lazy or none."""
    first = specs[0]
    rule, names, device = _rule(first.rule), first.formats, first.param.device
    if first.sparse_mode is not None:
        return _LazyLaunch(first.rule, names, device)
    if rule.reduction is None:
        return _Launch(first.rule, names, [math.prod(spec.shape) for spec in specs], device)
    return _reducing_launches(ReducingTensors(rule.reduction, specs, group_bytes(device)), first)


def _reducing_launches(
    tensors: ReducingTensors,
    spec: ParamSpec,
    passes: Sequence[tuple[Launch, torch.Tensor]] | None = None,
) -> ReducingLaunches:
    rule, names = _rule(spec.rule), spec.formats
    reduced = 0 if rule.reduction.along == "none" else 2
    block = _block_size((*names[:2], *names[2 + reduced :]), tensors.device)
    return ReducingLaunches(tensors, rule, _of_kernels(names), block, _options(), passes)


class _ElementwiseLaunch:
    """Of the element-wise kernel, for one rule and one combination of formats."""

    # what the last step launched for
    tensors: int
    programs: int
    chunks: tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # sizes, and as `ChunkMap.places`

    def __init__(self, rule: str, names: tuple[str, ...], device: torch.device) -> None:
        engine, found = _engine(), _rule(rule)
        self.chunk = engine.CHUNK_SIZE
        self._constants: dict[str, Any] = dict(
            RULE=found.function,
            OUTCOME=found.outcome,
            FORMATS=_of_kernels(names),
            COEFFICIENTS=len(found.coefficients),
            BLOCK=_block_size(names, device),
            CHUNK=self.chunk,
            **_options(),
        )

    def compile(self, *arguments: Any) -> list[Any]:
        kernel, grid = _engine().apply_kernel, (max(1, self.programs),)
        return [kernel.warmup(*self._all(*arguments), grid=grid, **self._constants)]

    def run(self, *arguments: Any) -> None:
        if self.programs:
            _engine().apply_kernel[(self.programs,)](*self._all(*arguments), **self._constants)

    def _all(
        self,
        table: torch.Tensor,
        rows: torch.Tensor,
        clip: torch.Tensor,
        found_inf: torch.Tensor,
        stride: int,
    ) -> tuple[Any, ...]:
        return (table, *self.chunks, rows, clip, found_inf, self.tensors, stride)


class _Launch(_ElementwiseLaunch):
    """Of whole tensors; what depends on their sizes is sent once."""

    def __init__(self, rule: str, names: tuple[str, ...], sizes: list[int], device: torch.device) -> None:
        super().__init__(rule, names, device)
        chunks = ChunkMap(sizes, self.chunk, device)
        self.tensors, self.programs = len(sizes), chunks.programs
        self.chunks = (torch.tensor(sizes, dtype=torch.int64, device=device), *chunks.places)
        self.table = StagedTable(8 * formats.table_rows(names) * len(sizes), device)

    @property
    def tables(self) -> list[torch.Tensor]:
        return [self.table.table, *self.chunks]


class _LazyLaunch(_ElementwiseLaunch):
    """Of runs of rows, other ones in every step, whose tables are allocated on its stream."""

    tables: tuple[torch.Tensor, ...] = ()

    def __init__(self, rule: str, names: tuple[str, ...], device: torch.device) -> None:
        super().__init__(rule, names, device)
        self._device = device

    def send(self, table: bytes, sizes: bytes, chunk_tensors: bytes, chunk_indices: bytes) -> torch.Tensor:
        """What `AddressList.lazy_table` gives; returns the table of addresses on the device."""
        of_sizes = self._sent(sizes, torch.int64)
        of_tensors, of_indices = (self._sent(data, torch.int32) for data in (chunk_tensors, chunk_indices))
        self.tensors, self.programs = len(of_sizes), len(of_tensors)
        self.chunks = of_sizes, of_tensors, of_indices
        return self._sent(table, torch.int64)

    def _sent(self, data: bytes, dtype: torch.dtype) -> torch.Tensor:
        if not data:
            return torch.empty(0, dtype=dtype, device=self._device)
        return torch.frombuffer(bytearray(data), dtype=dtype).to(self._device)


@functools.cache
def _missing() -> str | None:
    """What is not installed; None if nothing is."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:  # ROCm's comes under another name
        import triton

        version = str(triton.__version__)
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST:
        return f"triton {version} is too old, {'.'.join(map(str, OLDEST))} or newer is needed"
    return CPU.unavailable()


def _rule(name: str) -> Any:
    """The Triton function and the names of its coefficients; None if there is no such rule."""
    if _missing():
        return None
    from ..triton_kernels import rules

    return _CUSTOM.get(name) or rules.RULES.get(name)


_CUSTOM: dict[str, Any] = {}


def register_rule(name: str, function: Any, coefficients: tuple[str, ...]) -> None:
    """Adds an element-wise rule; `function` has the signature of those in danlu.triton_kernels.rules."""
    if _missing() is None:
        from ..triton_kernels import rules

        _CUSTOM[name] = rules.Rule(function, coefficients)
        _CUSTOM[f"layer_{name}"] = rules.layer_adapted(_CUSTOM[name])


def _engine() -> Any:
    from ..triton_kernels import engine

    return engine


def _formats() -> dict[str, Any]:
    """What kernels know of a format, by its name."""
    from ..triton_kernels.formats import FORMATS

    found: dict[str, Any] = FORMATS
    return found


def _of_kernels(names: tuple[str, ...]) -> tuple[Any, ...]:
    return tuple(_formats()[name] for name in names)


def _block_size(names: tuple[str, ...], device: torch.device) -> int:
    return 4096 if interpreted() else int(_engine().block_size(names, _lanes(device)))


def _options() -> dict[str, Any]:
    return {} if interpreted() else dict(_engine().OPTIONS)


def _lanes(device: torch.device) -> int:
    """Threads of a warp: 32, or 64 on AMD's large GPUs."""
    if device.type != "cuda":
        return 32
    return int(getattr(torch.cuda.get_device_properties(device), "warp_size", 32))


TRITON = Triton()
