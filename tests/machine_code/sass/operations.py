"""What the instructions of sm_90 mean. A modifier or form of operand that is not listed is `Unknown`."""

from __future__ import annotations

import re

import numpy as np

from . import arithmetic, integers, moves  # noqa: F401  they fill the table
from .machine import Instruction, Jump, Machine, Step, Unknown
from .operands import MAKERS, NUMBER, matched, pair, predicate


def decoded(instruction: Instruction) -> Step:
    root, *modifiers = instruction.opcode.split(".")
    guard = predicate(instruction.guard) if instruction.guard else None
    try:
        if instruction.opcode == "NOP":
            return Step(instruction, guard)
        if root in JUMPS:
            return Step(instruction, guard, jump=JUMPS[root](instruction, modifiers))
        uniform = root not in MAKERS and root.startswith("U")
        if uniform and any(re.search(r"(?<!U)(R|P)(\d|Z|T)", x) for x in instruction.operands):
            raise Unknown("operands of a uniform instruction")
        make, allowed = MAKERS[root[uniform:]]
        if len(set(modifiers)) < len(modifiers) or not set(modifiers) <= allowed:
            raise Unknown("modifiers")
        act = make(instruction, set(modifiers), list(instruction.operands))
        return Step(instruction, guard, act, uniform=uniform)
    except (Unknown, KeyError, ValueError, IndexError) as error:
        raise Unknown(f"{instruction}: {error!r}") from None


def jump_to(instruction: Instruction, modifiers: list[str]) -> Jump:
    """BRA, with more conditions than its guard, and CALL."""
    if modifiers not in ([], ["REL", "NOINC"]):
        raise Unknown("modifiers")
    *conditions, target = instruction.operands
    address = int(matched(NUMBER, target)[0], 16)
    holds = [predicate(condition) for condition in conditions]

    def jump(m: Machine, who: np.ndarray) -> list[tuple[int, np.ndarray]]:
        goes = np.logical_and.reduce([np.ones(len(who), bool), *(hold(m, who) for hold in holds)])
        return [(address, who[goes]), (instruction.address + 16, who[~goes])]

    return jump


def leave(instruction: Instruction, modifiers: list[str]) -> Jump:
    if modifiers or instruction.operands:
        raise Unknown("modifiers or operands")
    return lambda m, who: m.leave(who)


def barrier(text: str) -> int:
    return int(matched(r"B(\d+)", text)[1])


def join(instruction: Instruction, modifiers: list[str]) -> Jump:
    """BSSY, whose second operand is where threads meet if nothing else is said."""
    name, target = instruction.operands
    number = barrier(name)
    matched(NUMBER, target)

    def jump(m: Machine, who: np.ndarray) -> list[tuple[int, np.ndarray]]:
        m.join(number, who)
        return [(instruction.address + 16, who)]

    return jump


def meet(instruction: Instruction, modifiers: list[str]) -> Jump:
    (name,) = instruction.operands
    number = barrier(name)
    return lambda m, who: m.arrive(number, who, instruction.address + 16)


def come_back(instruction: Instruction, modifiers: list[str]) -> Jump:
    if modifiers != ["REL", "NODEC"]:
        raise Unknown("modifiers")
    (operand,) = instruction.operands
    target = pair(matched(r"(R\d+) 0x0", operand)[1])

    def jump(m: Machine, who: np.ndarray) -> list[tuple[int, np.ndarray]]:
        to = target(m, who)
        return [(int(address), who[to == address]) for address in np.unique(to)]

    return jump


JUMPS = {"BRA": jump_to, "CALL": jump_to, "RET": come_back, "EXIT": leave, "BSSY": join, "BSYNC": meet}
