"""One changed instruction gives other bits or a fault: the executor sees what it executes."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from danlu.testing import same_bits
from machine_code.memory import Fault
from machine_code.sass.launches import Executor, program
from machine_code.sass.machine import Instruction, Program
from test_sass import BY_ID, FULL, execute, library, optimizer, stepped, tensors  # noqa: F401  fixtures

CHUNK = 16384
# two turns of the loop in the second chunk, and a tail; two turns of elements one by one
SIZES = [(CHUNK + 2047, 0), (300, 1)]
BLOCKS = [0, 1, 2]  # a whole chunk, a last one, the only one


class Scenario:
    """A launch that can be repeated, and what it should give."""

    def __init__(self, rule: str, execute: Executor, library: Path) -> None:  # noqa: F811
        execute.blocks = BLOCKS
        self._optimizer = optimizer(BY_ID[rule], FULL, SIZES, backend="cuda")  # keeps the gradients
        self._start = [x.clone() for x in stepped(self._optimizer, FULL, 1)]  # with states that are not zero
        self._tensors = stepped(self._optimizer, FULL, 1)
        machine, name = execute.machines[-1], execute.names[-1]
        self._launch, self._memory = machine.launch, machine.memory
        self.program = program(library, name)
        self.executed = [self.program.steps[at].instruction for at in sorted(machine.executed)]
        same = optimizer(BY_ID[rule], FULL, SIZES, backend="reference")
        stepped(same, FULL, 1)
        self._want = stepped(same, FULL, 1)

    def right(self, instructions: list[Instruction]) -> bool:
        """Whether these give the bits of the reference."""
        for x, start in zip(self._tensors, self._start, strict=True):
            x.copy_(start)
        try:
            Program(instructions).run(self._launch, self._memory, blocks=BLOCKS)
        except Fault:
            return False
        return all(same_bits(got, want) for got, want in zip(self._tensors, self._want, strict=True))


def other_sign(i: Instruction) -> Instruction | None:
    """Of a factor or term; not where reciprocals are refined, since the quotient is so again."""
    if i.opcode not in ("FADD", "FMUL", "FMUL.FTZ", "FFMA") or i.operands[1] == i.operands[-1]:
        return None
    to, first, *others = i.operands
    return dataclasses.replace(i, operands=(to, first[1:] if first[0] == "-" else f"-{first}", *others))


def no_store(i: Instruction) -> Instruction | None:
    return dataclasses.replace(i, opcode="NOP", operands=()) if i.opcode.startswith("STG") else None


def other_guard(i: Instruction) -> Instruction | None:
    guard = i.guard[1:] if i.guard.startswith("!") else f"!{i.guard}"
    return dataclasses.replace(i, guard=guard) if i.guard else None


def other_address(i: Instruction) -> Instruction | None:
    """By one access."""
    if not re.match(r"LDG|STG", i.opcode):
        return None
    by = 16 if "128" in i.opcode else 4

    def moved(m: re.Match[str]) -> str:
        return f".64+{int(m[1] or '0', 16) + by:#x}]"

    return dataclasses.replace(
        i, operands=tuple(re.sub(r"\.64(?:\+(-?0x[0-9a-f]+))?\]", moved, x) for x in i.operands)
    )


def other_number(i: Instruction) -> Instruction | None:
    """In what becomes an address, a bound or the place of a coefficient in the list.

    A coefficient becomes the one of another row, or lies outside: one beside it may serve as well, where all
    that counts is that it is not 0.
    """
    if not re.match(r"U?MOV|U?IMAD|IADD3|VIADD|U?LDC", i.opcode) or "c[0x0][0x" in i.operands[1]:
        return None
    last = max((n for n, x in enumerate(i.operands) if re.search(r"0x[0-9a-f]+\]?$", x)), default=None)
    if last is None:
        return None
    by = 0x20 if "LDC" in i.opcode else 8
    operands = list(i.operands)
    operands[last] = re.sub(
        r"0x([0-9a-f]+)(\]?)$", lambda m: f"{int(m[1], 16) + by:#x}{m[2]}", operands[last]
    )
    return dataclasses.replace(i, operands=tuple(operands))


@pytest.mark.parametrize(
    ("rule", "change", "most"),
    [
        ("lion", other_sign, 20),
        ("lion", no_store, 20),
        ("lion", other_guard, 20),
        ("lion", other_address, 20),
        ("lion", other_number, 20),
        pytest.param(
            "adamw", other_sign, 20, marks=pytest.mark.full
        ),  # with what makes a quotient and a root of approximations
    ],
)
def test_a_change_is_noticed(
    rule: str,
    change: Callable[[Instruction], Instruction | None],
    most: int,
    execute: Executor,  # noqa: F811
    library: Path,  # noqa: F811
) -> None:
    scenario = Scenario(rule, execute, library)
    instructions = [step.instruction for step in scenario.program.steps]
    assert scenario.right(instructions)
    changed = [(old, new) for old in scenario.executed if (new := change(old))]
    changed = changed[:: -(-len(changed) // most)]
    assert len(changed) >= 6
    missed = [
        f"{old} as {new}"
        for old, new in changed
        if scenario.right([new if i is old else i for i in instructions])
    ]
    assert not missed, "\n".join(missed)
