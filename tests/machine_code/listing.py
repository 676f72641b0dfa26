"""Reads machine code of NVIDIA GPUs with the tools inside the triton wheel."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

GLOBAL, LOCAL = ("LDG", "STG"), ("LDL", "STL")
GENERIC = ("LD", "ST")
_MEMORY = re.compile(r"^(LDG|STG|LDL|STL|LDS|STS|LD|ST|LDGSTS|ATOM[GS]?|REDG?)(\.|$)")
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)\s*(.*?);")


@dataclass
class Function:
    """One kernel. `accesses` lists (position, opcode, bits) of its memory accesses; loops are ranges."""

    name: str
    registers: int
    stack: int
    local: int
    accesses: list[tuple[int, str, int]] = field(default_factory=list)
    loops: list[range] = field(default_factory=list)
    instructions: list[str] = field(default_factory=list)

    def within(self, loop: range) -> Counter[tuple[str, int]]:
        """How often a loop has each global access, by (opcode, bits)."""
        return Counter((op, bits) for at, op, bits in self.accesses if at in loop and op in GLOBAL)

    def hot_loop(self) -> Counter[tuple[str, int]]:
        """Of the loop that moves the most bytes in a turn."""
        turns = [self.within(loop) for loop in self.loops]
        return max(turns, key=lambda found: sum(bits * n for (_, bits), n in found.items()))


def tool(name: str) -> Path:
    spec = importlib.util.find_spec("triton")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "backends/nvidia/bin" / name


def functions(cubin: Path) -> list[Function]:
    """The kernels of a cubin file."""
    usage = _output([tool("cuobjdump"), "-res-usage", cubin])
    pattern = r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)"
    found = {m[1]: Function(m[1], int(m[2]), int(m[3]), int(m[4])) for m in re.finditer(pattern, usage)}
    current: Function | None = None
    labels: dict[str, int] = {}
    for line in _output([tool("nvdisasm"), "-c", cubin]).splitlines():
        if section := re.match(r"\s*\.text\.(\S+):", line):
            current, labels = found[section[1]], {}
        elif current is None:
            continue
        elif label := re.match(r"(\.L_\S+):", line):
            labels[label[1]] = len(current.instructions)
        elif instruction := _INSTRUCTION.match(line):
            _add(current, labels, instruction[1], instruction[2])
    return list(found.values())


def demangled(names: Sequence[str]) -> list[str]:
    return _output(["c++filt", *names]).splitlines()


def _add(function: Function, labels: dict[str, int], opcode: str, operands: str) -> None:
    at = len(function.instructions)
    function.instructions.append(opcode)
    if memory := _MEMORY.match(opcode):
        function.accesses.append((at, memory[1], _bits(opcode)))
    if opcode.startswith("BRA"):
        target = re.search(r"(\.L_\w+)", operands)
        if target and labels.get(target[1], at) < at:  # a jump to itself ends every kernel
            function.loops.append(range(labels[target[1]], at + 1))


def _bits(opcode: str) -> int:
    for bits in (256, 128, 64):
        if re.search(rf"\.{bits}(\.|$)", opcode):
            return bits
    for bits in (16, 8):
        if re.search(rf"\.[US]{bits}(\.|$)", opcode):
            return bits
    return 32


def _output(command: Sequence[str | Path]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
