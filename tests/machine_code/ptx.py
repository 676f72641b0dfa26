"""Reads PTX: a kernel's parameters, registers, shared memory and instructions."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace

SIZES = {"b8": 1, "u8": 1, "s8": 1, "b16": 2, "u16": 2, "s16": 2, "f16": 2, "bf16": 2, "b32": 4, "u32": 4}
SIZES |= {"s32": 4, "f32": 4, "bf16x2": 4, "f16x2": 4, "b64": 8, "u64": 8, "s64": 8, "f64": 8}

_ENTRY = re.compile(r"^(?:\.visible\s+)?\.entry\s+(\w+)\s*\(([^)]*)\)([^{]*)\{$(.*?)^\}$", re.M | re.S)
_PARAMETER = re.compile(
    r"\.param (?:\.align (\d+) )?\.(\w+)(?: \.ptr \.global \.align 1)? (\w+)(?:\[(\d+)\])?"
)
_SHARED = re.compile(r"(?:\.extern )?\.shared \.align (\d+) \.b8 (\w+)\[(\d*)\]")
_REGISTERS = re.compile(r"\.reg \.(pred|b16|b32|f32|b64|f64)\s+(%[a-z]+)<(\d+)>")
_INSTRUCTION = re.compile(r"(?:@(!?)(%p\d+)\s+)?([a-z]\w*(?:\.\w+)*)(?:\s+(.*))?")
_OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,{}\[\]]+")


@dataclass(frozen=True)
class Instruction:
    """`opcode` with its modifiers, as `add.rn.f32`; operands as they are written."""

    opcode: str
    operands: tuple[str, ...] = ()
    predicate: str | None = None
    negated: bool = False

    def __str__(self) -> str:
        guard = f"@{'!' * self.negated}{self.predicate} " if self.predicate else ""
        return f"{guard}{self.opcode} {', '.join(self.operands)};"


@dataclass
class Kernel:
    """An entry. Parameters and shared arrays have (offset, size), registers their size, 0 of a predicate."""

    name: str
    threads: int  # of a block
    parameters: dict[str, tuple[int, int]]
    parameter_bytes: int
    shared: dict[str, int]
    shared_bytes: int
    registers: dict[str, tuple[int, int]]  # number of the first, and size, by name without number
    register_count: int
    labels: dict[str, int] = field(default_factory=dict)
    code: list[Instruction] = field(default_factory=list)

    def changed(self, at: int, instead: Instruction | None) -> Kernel:
        """A copy with another instruction in the place of one, or with none."""
        if instead is None:
            instead = Instruction("bra.uni", ("$next",))
        labels = {**self.labels, "$next": at + 1}
        return replace(self, code=[*self.code[:at], instead, *self.code[at + 1 :]], labels=labels)

    def register(self, name: str) -> tuple[int, int]:
        """Its number among all, and its size."""
        match = re.fullmatch(r"(%[a-z]+)(\d+)", name)
        if match is None or match[1] not in self.registers:
            raise SyntaxError(f"no register {name}")
        first, size = self.registers[match[1]]
        return first + int(match[2]), size


def parse(text: str, dynamic_shared_bytes: int = 0) -> Kernel:
    """The one kernel of a text. dynamic_shared_bytes: of `.extern .shared` arrays."""
    text = re.sub(r"[ \t]+", " ", re.sub(r"//.*", "", text))
    (entry,) = _ENTRY.finditer(re.sub(r" *\n *", "\n", text))
    name, parameters, performance, body = entry.groups()
    threads = re.search(r"\.(?:maxntid|reqntid) (\d+)(?:, 1, 1)?$", performance, re.M)
    if threads is None:
        raise SyntaxError(f"{name}: no size of blocks")
    places, parameter_bytes = _parameters(parameters)
    shared, shared_bytes = _shared(text, body, dynamic_shared_bytes)
    registers, count = {}, 0
    for kind, prefix, number in _REGISTERS.findall(body):
        registers[prefix] = (count, SIZES.get(kind, 0))
        count += int(number)
    kernel = Kernel(name, int(threads[1]), places, parameter_bytes, shared, shared_bytes, registers, count)
    for line in re.split(r"[;\n]", body):
        _read(line.strip(), kernel)
    return kernel


def _read(line: str, kernel: Kernel) -> None:
    while line.startswith("$"):
        label, _, line = line.partition(":")
        kernel.labels[label] = len(kernel.code)
        line = line.lstrip()
    if not line or line.startswith((".loc ", ".pragma ", ".reg ", ".shared ")):
        return
    kernel.code.append(instruction(line))


def instruction(text: str) -> Instruction:
    match = _INSTRUCTION.fullmatch(text.rstrip(";"))
    if match is None:
        raise SyntaxError(text)
    negated, predicate, opcode, rest = match.groups()
    operands = tuple(found for operand in _OPERAND.findall(rest or "") if (found := operand.strip()))
    return Instruction(opcode, operands, predicate, bool(negated))


def _parameters(text: str) -> tuple[dict[str, tuple[int, int]], int]:
    places, at = {}, 0
    for line in filter(None, (line.strip() for line in text.split("\n"))):
        match = _PARAMETER.fullmatch(line.rstrip(","))
        if match is None:
            raise SyntaxError(line)
        align, kind, name, count = match.groups()
        size = SIZES[kind] * int(count or 1)
        at = -(-at // int(align or size)) * int(align or size)
        places[name] = (at, size)
        at += size
    return places, at


def _shared(text: str, body: str, dynamic_bytes: int) -> tuple[dict[str, int], int]:
    """Of the module's arrays those that the kernel uses."""
    places, at = {}, 0
    for align, name, size in _SHARED.findall(text):
        if not re.search(rf"\b{name}\b", body):
            continue
        at = -(-at // int(align)) * int(align)
        places[name] = at
        at += int(size or dynamic_bytes)
    return places, -(-at // 16) * 16
