"""The GPU backends over CPU tensors, with what compilers made of their kernels in the place of a GPU.

Everything else is as on a GPU: plans, tables, parameters and the order of launches.
"""

from __future__ import annotations

import importlib.util
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from danlu.backends import triton as backend
from emulated import Emulated

from . import code, machine, ptx
from .memory import Fault, RecentTensors
from .program import Program

Change = Callable[[ptx.Kernel], ptx.Kernel]
DEVICE = 7  # a number of its own keeps Triton's caches in memory apart from those of other tests


class Executor:
    """Executes launches of one backend, whose names it notes.

    change: what is done to a kernel before; steps: a launch's instructions, as `machine.launch` has them.
    """

    backend: str

    def __init__(self, tensors: RecentTensors) -> None:
        self.change: Change | None = None
        self.steps = machine.STEPS
        self.names: list[str] = []
        self._tensors = tensors

    def launch(self, name: str, kernel: Callable[[], Program], parameters: bytes, blocks: int) -> None:
        self.names.append(name)
        program = kernel()
        if self.change is not None:
            changed = self.change(program.kernel)
            program = program if changed is program.kernel else Program(changed)
        machine.launch(program, parameters, blocks, self._tensors.memory(), self.steps)


@contextmanager
def executor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Executor]:
    """Of the backend that is the request's parameter, for the time of a test."""
    importlib.util.find_spec("triton") or missing("triton, whose wheel has cuobjdump")
    if request.param == "cuda":
        code.library() or missing("danlu._cuda")
        emulated = request.getfixturevalue("cuda")
    with RecentTensors() as tensors:
        if request.param == "triton":
            yield Triton(tensors, monkeypatch)
            return
        yield Cuda(tensors, emulated)
        emulated.native.machine().executor = None


def missing(what: str) -> None:
    assert not os.environ.get("CI"), f"CI needs {what}"
    pytest.skip(f"there is no {what}")


# CUDA

_PROGRAMS: dict[Any, Program] = {}


class Cuda(Executor):
    """In the place of the emulator's fibers: PTX out of the built `danlu._cuda`."""

    backend = "cuda"

    def __init__(self, tensors: RecentTensors, emulated: Emulated) -> None:
        super().__init__(tensors)
        assert emulated.native is not None
        self._names = code.symbols(Path(emulated.native.__file__ or ""))
        self._library = code.library()
        emulated.native.machine().executor = self.execute

    def execute(self, call: Any) -> None:
        name = self._names[call.place]
        program = self.program(name)
        if (*call.grid[1:], *call.block) != (1, 1, program.kernel.threads, 1, 1):
            raise Fault(f"{name}: a grid of {call.grid} blocks of {call.block}")
        self.launch(name, lambda: program, call.parameters, call.grid[0])

    def program(self, name: str) -> Program:
        """Of a kernel by its plain name."""
        if name not in _PROGRAMS:
            assert self._library is not None
            found = code.ptx(self._library)
            assert name in found, f"danlu._cuda is built without PTX of {name}"
            _PROGRAMS[name] = Program(ptx.parse(found[name]))
        return _PROGRAMS[name]


# Triton


class Triton(Executor):
    """In the place of Triton's launcher: kernels are compiled for 9.0."""

    backend = "triton"

    def __init__(self, tensors: RecentTensors, monkeypatch: pytest.MonkeyPatch) -> None:
        import triton
        from triton.runtime.jit import JITFunction

        super().__init__(tensors)
        monkeypatch.setattr(backend.Triton, "device_types", ("cpu",))
        monkeypatch.setattr(backend.Triton, "unavailable", lambda self: None)
        monkeypatch.setattr(triton.runtime.driver, "_active", _Driver())
        compile_kernel = JITFunction.run

        def run(function: Any, *arguments: Any, grid: tuple[int], warmup: bool, **constants: Any) -> Any:
            kernel = compile_kernel(function, *arguments, grid=grid, warmup=True, **constants)
            kernel.module = "loaded"  # no driver shall try
            if not warmup:
                self._execute(function, kernel, arguments, grid)
            return kernel

        monkeypatch.setattr(JITFunction, "run", run)

    def _execute(self, function: Any, kernel: Any, arguments: tuple[Any, ...], grid: tuple[int]) -> None:
        kinds = kernel.src.signature
        values = [
            value
            for name, value in zip(function.arg_names, arguments, strict=False)
            if kinds[name] != "constexpr"
        ]
        program = self.program(kernel)
        (blocks,) = grid
        self.launch(kernel.name, lambda: program, _packed(program.kernel, values), blocks)

    def program(self, kernel: Any) -> Program:
        if kernel.hash not in _PROGRAMS:
            _PROGRAMS[kernel.hash] = Program(ptx.parse(kernel.asm["ptx"], kernel.metadata.shared))
        return _PROGRAMS[kernel.hash]


class _Driver:
    """Stands for a Hopper GPU of which only the name is known."""

    def get_current_device(self) -> int:
        return DEVICE

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


def _packed(kernel: ptx.Kernel, values: list[Any]) -> bytes:
    """The parameters as the driver lays them out."""
    *places, _, _ = kernel.parameters.values()  # Triton adds two pointers to scratch, which nothing uses
    parameters = bytearray(kernel.parameter_bytes)
    for (at, size), value in zip(places, values, strict=True):
        number = value if isinstance(value, int) else value.data_ptr()
        struct.pack_into({4: "<i", 8: "<Q"}[size], parameters, at, number)
    return bytes(parameters)
