"""Integers and logic."""

from __future__ import annotations

import re

import numpy as np

from ..memory import Fault
from .machine import Instruction, Machine, Unknown, Who
from .operands import (
    I32,
    I64,
    NUMBER,
    U32,
    U64,
    Act,
    Value,
    bits,
    false,
    integer,
    matched,
    operation,
    pair,
    predicate,
    put_wide,
    register,
    set_predicate,
    writes,
)


def outputs(o: list[str]) -> tuple[str, list[str], list[str]]:
    """The destination, predicates that are written, and the rest."""
    rest = o[1:]
    carries = []
    while re.fullmatch(r"U?P[0-6T]", rest[0]):
        carries.append(rest.pop(0))
    return o[0], carries, rest


def add(to: str, carry_to: list[str], terms: list[Value], carries: list[Value]) -> Act:
    index = register(to)
    put = [set_predicate(x) for x in carry_to]
    if len(put) > 1:
        raise Unknown("two carries")

    def act(m: Machine, who: Who) -> None:
        values = [term(m, who).astype(U64) for term in [*terms, *carries]]
        total = np.add.reduce(values)
        for p in put:
            if (total >> U64(33)).any():
                raise Fault("a sum has more than one carry")
            p(m, who, total >> U64(32) != 0)
        m.write(index, (total & U64(0xFFFFFFFF)).astype(U32), who)

    return act


@operation("IADD3", "X")
def _(i: Instruction, modifiers: set[str], o: list[str]) -> Act:
    to, carry_to, rest = outputs(o)
    terms, carries = rest[:3], rest[3:]
    if len(carries) != (2 if modifiers else 0) or ((carry_to or carries) and any(map(negated, terms))):
        raise Unknown("carries")
    return add(to, carry_to, [integer(x) for x in terms], [predicate(x) for x in carries])


def negated(text: str) -> bool:
    return text.startswith("-") and not re.fullmatch(NUMBER, text)


@operation("VIADD")
def _(i: Instruction, modifiers: set[str], o: list[str]) -> Act:
    to, *terms = o
    first, second = map(integer, terms)
    return add(to, [], [first, second], [])


@operation("IMAD", "IADD MOV SHL U32 X WIDE")
def _(i: Instruction, modifiers: set[str], o: list[str]) -> Act:
    to, *factors = o[:3]
    first, second = map(bits, factors)
    if "WIDE" in modifiers:
        if len(modifiers - {"U32"}) > 1 or len(o) > 4:
            raise Unknown("modifiers")
        addend, index, signed = pair(o[3]), register(to), "U32" not in modifiers

        def act(m: Machine, who: Who) -> None:
            a, b = first(m, who), second(m, who)
            if signed:
                a, b = (x.view(I32).astype(I64).view(U64) for x in (a, b))
            put_wide(m, index, a.astype(U64) * b.astype(U64) + addend(m, who), who)

        return act
    # the others are names for the same lower 32 bits
    carries = o[4:]
    if len(carries) != ("X" in modifiers) or (modifiers > {"X"}):
        raise Unknown("carries")
    product = [lambda m, who: first(m, who) * second(m, who)]
    return add(to, [], [*product, integer(o[3])], [predicate(x) for x in carries])


@operation("LEA", "HI X")
def _(i: Instruction, modifiers: set[str], o: list[str]) -> Act:
    """The first operand is shifted, the second is added."""
    to, carry_to, rest = outputs(o)
    first, second = integer(rest.pop(0)), bits(rest.pop(0))
    if "HI" not in modifiers:
        (amount,) = rest
        by = U32(int(matched(NUMBER, amount)[0], 16))
        if modifiers or (carry_to and negated(o[2])):
            raise Unknown("modifiers")
        return add(to, carry_to, [lambda m, who: first(m, who) << by, second], [])
    high, amount, *carries = rest
    upper, n = bits(high), U64(int(matched(NUMBER, amount)[0], 16))
    if len(carries) != ("X" in modifiers) or carry_to or negated(o[1]):
        raise Unknown("carries")

    def shifted(m: Machine, who: Who) -> np.ndarray:
        whole = first(m, who).astype(U64) | upper(m, who).astype(U64) << U64(32)
        return (whole << n) >> U64(32)

    return add(to, [], [shifted, second], [predicate(x) for x in carries])


@operation("SHF", "L R U32 S32 U64 HI")
def _(i: Instruction, modifiers: set[str], o: list[str]) -> Act:
    to, *values = o
    low, amount, high = map(bits, values)

    def left(m: Machine, who: Who) -> np.ndarray:
        return np.left_shift(low(m, who).astype(U64), np.minimum(amount(m, who), U32(32)).astype(U64)).astype(
            U32
        )

    def left_high(m: Machine, who: Who) -> np.ndarray:
        whole = low(m, who).astype(U64) | high(m, who).astype(U64) << U64(32)
        return (whole << np.minimum(amount(m, who), U32(63)).astype(U64) >> U64(32)).astype(U32)

    def right(m: Machine, who: Who) -> np.ndarray:
        n = np.minimum(amount(m, who), U32(32)).astype(U64)
        return (high(m, who).astype(U64) >> n).astype(U32)

    def right_signed(m: Machine, who: Who) -> np.ndarray:
        return (high(m, who).view(I32) >> np.minimum(amount(m, who), U32(31)).astype(I32)).view(U32)

    kinds = {
        ("L", "U32"): (left, values[2]),
        ("HI", "L", "U64"): (left_high, None),
        ("HI", "R", "U32"): (right, values[0]),
        ("HI", "R", "S32"): (right_signed, values[0]),
    }
    value, zero = kinds[tuple(sorted(modifiers, key=lambda x: (x.startswith(("U", "S")), x)))]
    if zero is not None:
        matched("U?RZ", zero)
    return writes(to, value)


def looked_up(table: int, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """The function of three bits whose values the table has."""
    found = np.zeros_like(a)
    for n in range(8):
        if table >> n & 1:
            found |= (a if n & 4 else ~a) & (b if n & 2 else ~b) & (c if n & 1 else ~c)
    return found


@operation("LOP3", "LUT")
def _(i: Instruction, modifiers: set[str], o: list[str]) -> Act:
    flag = o.pop(0) if re.fullmatch(r"U?P[0-6T]", o[0]) else None
    to, *values, table, none = o
    false(none)
    a, b, c = map(bits, values)
    lut, index = int(matched(NUMBER, table)[0], 16), register(to)
    put = set_predicate(flag) if flag else None

    def act(m: Machine, who: Who) -> None:
        value = looked_up(lut, a(m, who), b(m, who), c(m, who))
        if put:
            put(m, who, value != 0)
        m.write(index, value, who)

    return act


@operation("PLOP3", "LUT")
def _(i: Instruction, modifiers: set[str], o: list[str]) -> Act:
    first, second, *values, lut, _ = o
    matched("U?PT", second)
    a, b, c = map(predicate, values)
    put, table = set_predicate(first), int(matched(NUMBER, lut)[0], 16)
    return lambda m, who: put(m, who, looked_up(table, a(m, who), b(m, who), c(m, who)))
