"""Operands of instructions, and the table of what instructions mean."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TypeAlias

import numpy as np

from .machine import UNIFORM, Instruction, Machine, Unknown, Who

U32, U64, I32, I64, F32 = np.uint32, np.uint64, np.int32, np.int64, np.float32
Value: TypeAlias = Callable[[Machine, Who], np.ndarray]
Act: TypeAlias = Callable[[Machine, Who], None]
Maker: TypeAlias = "Callable[[Instruction, set[str], list[str]], Act]"  # from modifiers and operands
NUMBER = r"-?0x[0-9a-f]+"
MAKERS: dict[str, tuple[Maker, set[str]]] = {}  # with the modifiers that they know


def operation(root: str, modifiers: str = "") -> Callable[[Maker], Maker]:
    def register(make: Maker) -> Maker:
        MAKERS[root] = make, set(modifiers.split())
        return make

    return register


def matched(pattern: str, text: str) -> re.Match[str]:
    found = re.fullmatch(pattern, text)
    if not found:
        raise Unknown(f"operand {text}")
    return found


def register(text: str) -> int:
    kind, number = matched(r"(U?)R(\d+|Z)", text.replace(".reuse", "")).groups()
    if number == "Z":
        return UNIFORM + 63 if kind else 255
    return int(number) + (UNIFORM if kind else 0)


def after(number: int, by: int) -> int:
    """The register of a row of them; those after a zero register are zero."""
    return number if number in (255, UNIFORM + 63) else number + by


def bits(text: str) -> Value:
    """A register or an immediate number."""
    if re.fullmatch(NUMBER, text):
        number = U32(int(text, 16) & 0xFFFFFFFF)
        return lambda m, who: np.full(m.count(who), number)
    index = register(text)
    return lambda m, who: m.registers[index, who]


def integer(text: str) -> Value:
    """Perhaps the negative of it."""
    if text.startswith("-") and not re.fullmatch(NUMBER, text):
        value = bits(text[1:])
        return lambda m, who: U32(0) - value(m, who)
    return bits(text)


def pair(text: str) -> Value:
    """64 bits in two registers."""
    low = register(text)
    high = after(low, 1)
    return lambda m, who: m.registers[low, who].astype(U64) | m.registers[high, who].astype(U64) << U64(32)


def real(text: str) -> Value:
    """fp32 in a register, with its sign changed or dropped, or a number."""
    text = text.replace(".reuse", "").strip()
    if m := re.fullmatch(r"(-?)(\|?)(U?R\w+)\2", text):
        index = register(m[3])
        keep, flip = U32(0x7FFFFFFF if m[2] else 0xFFFFFFFF), U32(0x80000000 if m[1] else 0)
        return lambda m, who: (m.registers[index, who] & keep ^ flip).view(F32)
    number = F32(matched(r"[+-]?(INF|QNAN|\d[\d.]*(e[+-]?\d+)?)", text)[0].replace("Q", ""))
    return lambda m, who: np.full(m.count(who), number)


def predicate(text: str) -> Value:
    inverted, kind, number = matched(r"(!?)(U?)P([0-6T])", text).groups()
    index = (7 if number == "T" else int(number)) + (8 if kind else 0)
    if inverted:
        return lambda m, who: ~m.predicates[index, who]
    return lambda m, who: m.predicates[index, who]


def set_predicate(text: str) -> Callable[[Machine, Who, np.ndarray], None]:
    kind, number = matched(r"(U?)P([0-6T])", text).groups()
    index = (7 if number == "T" else int(number)) + (8 if kind else 0)

    def put(m: Machine, who: Who, value: np.ndarray) -> None:
        if number != "T":
            m.predicates[index, who] = value

    return put


def false(text: str) -> None:
    matched("!U?PT", text)


def writes(to: str, value: Value) -> Act:
    index = register(to)
    return lambda m, who: m.write(index, value(m, who), who)


def writes_real(to: str, value: Value) -> Act:
    return writes(to, lambda m, who: value(m, who).astype(F32).view(U32))


def put_wide(m: Machine, to: int, value: np.ndarray, who: Who) -> None:
    m.write(to, (value & U64(0xFFFFFFFF)).astype(U32), who)
    m.write(after(to, 1), (value >> U64(32)).astype(U32), who)
