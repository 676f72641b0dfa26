"""Executes machine code of sm_90, what ptxas makes of an element-wise kernel, without a GPU.

It is strict: what it does not know is an error, an address outside of the kernel's parameters or tensors is a
`Fault`, registers hold garbage before they are written, and approximations are off by what a GPU's may be.
Threads are vectors of numpy. Those that are at the same instruction are a group, and the group that is
furthest behind runs; a warp's threads wait for each other where BSYNC says so. There is no shared memory.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np

from ..code import plain
from ..listing import tool
from ..memory import Fault, Memory

WARP = 32
PARAMETERS = 0x210  # where they begin in constant bank 0
BLOCK_SIZE, GRID_SIZE, STACK, DESCRIPTOR = 0x0, 0xC, 0x28, 0x208
UNIFORM = 256  # the number of UR0; R255 and UR63 are zero
ZEROS = (255, UNIFORM + 63)
AT_ONCE = 16  # blocks
BARRIERS = 16

Who: TypeAlias = "slice | np.ndarray"  # threads
Jump: TypeAlias = "Callable[[Machine, np.ndarray], list[tuple[int, np.ndarray]]]"


class Unknown(Exception):  # noqa: N818
    """An instruction that this executor has no meaning for."""


@dataclass(frozen=True)
class Instruction:
    address: int
    guard: str  # of the form !P0, or empty
    opcode: str  # with its modifiers
    operands: tuple[str, ...]

    def __str__(self) -> str:
        guard = f"@{self.guard} " if self.guard else ""
        return f"{self.address:#06x}: {guard}{self.opcode} {', '.join(self.operands)}"


@dataclass(frozen=True)
class Access:
    """One global access of some threads."""

    instruction: Instruction
    threads: np.ndarray
    addresses: np.ndarray
    bytes: int

    @property
    def stores(self) -> bool:
        return self.instruction.opcode.startswith("STG")


def listed(text: str) -> dict[str, list[Instruction]]:
    """Functions of what `cuobjdump -sass` prints."""
    found: dict[str, list[Instruction]] = {}
    current: list[Instruction] = []
    for line in text.splitlines():
        if function := re.search(r"Function : (\S+)", line):
            current = found.setdefault(function[1], [])
        elif m := re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?(\S+)\s*(.*?)\s*;", line):
            operands = tuple(x.strip() for x in re.split(r",\s*(?![^\[]*\])", m[4])) if m[4] else ()
            current.append(Instruction(int(m[1], 16), m[2] or "", m[3], operands))
    return found


def disassembled(cubin: Path) -> dict[str, list[Instruction]]:
    """The kernels of a cubin file by their `plain` names."""
    command = [tool("cuobjdump"), "-sass", cubin]
    found = listed(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return dict(zip(plain(list(found)), found.values(), strict=True))


@dataclass(frozen=True)
class Launch:
    parameters: bytes
    blocks: int
    threads: int  # of a block


@dataclass(frozen=True)
class Step:
    """An instruction with its meaning: it does something, or says which threads go to which address."""

    instruction: Instruction
    guard: Callable[[Machine, Who], np.ndarray] | None = None
    act: Callable[[Machine, Who], None] | None = None
    jump: Jump | None = None
    uniform: bool = False  # executed for a whole warp, whoever is there


class Program:
    """A kernel, decoded."""

    def __init__(self, instructions: Sequence[Instruction]) -> None:
        from .operations import decoded  # which know the machine

        self.steps = [decoded(instruction) for instruction in instructions]
        self._places = {instruction.address: i for i, instruction in enumerate(instructions)}

    def index(self, address: int) -> int:
        if address not in self._places:
            raise Fault(f"a jump to {address:#x}, where no instruction is")
        return self._places[address]

    def run(
        self, launch: Launch, memory: Memory, *, seed: int = 0, blocks: Sequence[int] = ()
    ) -> list[Machine]:
        """Runs these blocks of a launch, or all of them, and gives the machines after it."""
        chosen = blocks or range(launch.blocks)
        machines = [
            Machine(launch, memory, chosen[first : first + AT_ONCE], seed)
            for first in range(0, len(chosen), AT_ONCE)
        ]
        for machine in machines:
            machine.run(self)
        return machines


class Machine:
    """Blocks of a launch in execution."""

    def __init__(self, launch: Launch, memory: Memory, blocks: Sequence[int], seed: int) -> None:
        self.launch, self.memory = launch, memory
        self.random = np.random.default_rng([seed, *blocks])
        self.threads = len(blocks) * launch.threads
        self.thread = np.tile(np.arange(launch.threads, dtype=np.uint32), len(blocks))
        self.block = np.repeat(np.array(blocks, np.uint32), launch.threads)
        self.registers = self.random.integers(0, 1 << 32, (UNIFORM + 64, self.threads), np.uint32)
        self.registers[list(ZEROS)] = 0
        self.predicates = self.random.random((16, self.threads)) < 0.5  # P0 to PT, UP0 to UPT
        self.predicates[[7, 15]] = True
        self._joining = np.zeros((BARRIERS, self.threads), bool)  # in what BSSY began
        self._arrived = np.full((BARRIERS, self.threads), -1)  # from which address they go on
        self.executed: set[int] = set()  # steps that some thread took
        self.accesses: list[Access] = []
        self._fill_constants()

    def constants(self, addresses: np.ndarray, words: int) -> list[np.ndarray]:
        """From signed addresses in bank 0; nothing wraps."""
        size = 4 * words
        inside = (addresses >= 0) & (addresses <= len(self._bank) - size) & (addresses % size == 0)
        inside[inside] = self._known[addresses[inside]] & self._known[addresses[inside] + size - 1]
        if not inside.all():
            raise Fault(f"constant read of {size} bytes at {int(addresses[~inside][0]):#x}")
        bank = self._bank.view(np.uint32)
        return [bank[(addresses >> 2) + i] for i in range(words)]

    def whole_warps(self, who: np.ndarray) -> np.ndarray:
        """All threads of the warps that have one of these."""
        if len(who) == self.threads:
            return who
        there = np.zeros((self.threads // WARP, WARP), bool)
        there[who // WARP] = True
        return np.flatnonzero(there)

    def count(self, who: Who) -> int:
        return self.threads if isinstance(who, slice) else len(who)

    def join(self, barrier: int, who: np.ndarray) -> None:
        """They will wait for each other, within each warp."""
        self._joining[barrier, self.whole_warps(who)] = False
        self._joining[barrier, who] = True

    def arrive(self, barrier: int, who: np.ndarray, address: int) -> list[tuple[int, np.ndarray]]:
        """Gives those that may go on; who did not join does."""
        joined = self._joining[barrier, who]
        self._arrived[barrier, who[joined]] = address
        return [(address, who[~joined]), *self._released(barrier)]

    def leave(self, who: np.ndarray) -> list[tuple[int, np.ndarray]]:
        self._joining[:, who] = False
        return [found for barrier in range(BARRIERS) for found in self._released(barrier)]

    def _released(self, barrier: int) -> list[tuple[int, np.ndarray]]:
        arrived = self._arrived[barrier]
        missing = (self._joining[barrier] & (arrived < 0)).reshape(-1, WARP).any(1)
        free = np.flatnonzero((arrived >= 0) & ~np.repeat(missing, WARP))
        found = [(int(at), free[arrived[free] == at]) for at in np.unique(arrived[free])]
        self._joining[barrier, free], arrived[free] = False, -1
        return found

    def write(self, register: int, value: np.ndarray, who: Who) -> None:
        if register not in ZEROS:
            self.registers[register, who] = value

    def run(self, program: Program, limit: int = 80_000) -> None:
        groups = {0: np.arange(self.threads)}
        with np.errstate(all="ignore"):
            for _ in range(limit):
                if not groups:
                    break
                at = min(groups)
                step, who = program.steps[at], groups.pop(at)
                try:
                    for place, threads in self._step(program, step, at, who):
                        if len(threads):
                            there = groups.get(place)
                            groups[place] = threads if there is None else np.concatenate([there, threads])
                except Fault as fault:
                    raise Fault(f"{step.instruction}: {fault}") from None
            else:
                raise Fault("the kernel does not end")
        if (self._arrived >= 0).any():
            raise Fault("threads wait for others that do not come")

    def _step(self, program: Program, step: Step, at: int, who: np.ndarray) -> list[tuple[int, np.ndarray]]:
        stay = []
        if step.guard:
            holds = step.guard(self, who)
            who, stay = who[holds], [(at + 1, who[~holds])]
        if not len(who):
            return stay
        self.executed.add(at)
        if step.jump:
            return stay + [(program.index(address), threads) for address, threads in step.jump(self, who)]
        if step.act:
            acting = self.whole_warps(who) if step.uniform else who
            step.act(self, slice(None) if len(acting) == self.threads else acting)
        return [*stay, (at + 1, who)]

    def _fill_constants(self) -> None:
        self.descriptor = self.random.integers(0, 1 << 32, 2, np.uint32)
        self._bank, self._known = np.zeros(1 << 16, np.uint8), np.zeros(1 << 16, bool)
        for at, content in (
            (BLOCK_SIZE, np.uint32(self.launch.threads).tobytes()),
            (GRID_SIZE, np.uint32(self.launch.blocks).tobytes()),
            (STACK, np.uint32(0xFFFDC0).tobytes()),
            (DESCRIPTOR, self.descriptor.tobytes()),
            (PARAMETERS, self.launch.parameters),
        ):
            self._bank[at : at + len(content)] = np.frombuffer(content, np.uint8)
            self._known[at : at + len(content)] = True
