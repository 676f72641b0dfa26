"""Launches of the emulated module, executed by what ptxas made of their kernels."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

from emulated import Emulated

from .. import built, code
from ..memory import Fault, RecentTensors
from .machine import Instruction, Launch, Machine, Program, disassembled


@cache
def kernels(library: Path, struct: str) -> dict[str, list[Instruction]]:
    """The machine code of an element-wise rule by the kernels' `plain` names."""
    mark = f"apply_kernelINS_4cuda{len(struct)}{struct}E".encode()
    (cubin,) = (path for path in code.cubins(library, built.ARCHITECTURE) if mark in path.read_bytes())
    return _disassembled(cubin)


@cache
def _disassembled(cubin: Path) -> dict[str, list[Instruction]]:
    return disassembled(cubin)


@cache
def program(library: Path, name: str) -> Program:
    struct = re.match(r"danlu::apply_kernel<danlu::cuda::(\w+),", name)
    assert struct, f"{name} is not element-wise"
    found = kernels(library, struct[1])
    assert name in found, f"danlu._cuda is built without {name}"
    return Program(found[name])


class Executor:
    """Takes the place of the emulator's fibers; runs some `blocks`, or all of them."""

    def __init__(self, tensors: RecentTensors, emulated: Emulated, library: Path) -> None:
        assert emulated.native is not None
        self._names = code.symbols(Path(emulated.native.__file__ or ""))
        self._tensors, self._library = tensors, library
        self.seed, self.blocks = 0, list[int]()
        self.names: list[str] = []
        self.machines: list[Machine] = []
        emulated.native.machine().executor = self.execute

    def execute(self, call: Any) -> None:
        name = self._names[call.place]
        if (*call.grid[1:], *call.block[1:]) != (1, 1, 1, 1):
            raise Fault(f"{name}: a grid of {call.grid} blocks of {call.block}")
        self.names.append(name)
        launch = Launch(call.parameters, call.grid[0], call.block[0])
        memory = self._tensors.memory()
        run = program(self._library, name).run
        self.machines += run(launch, memory, seed=self.seed, blocks=self.blocks)
