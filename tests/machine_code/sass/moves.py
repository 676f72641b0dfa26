"""Moves between registers, constants and global memory."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..memory import Fault
from .machine import UNIFORM, WARP, Access, Instruction, Machine, Unknown, Who
from .operands import (
    I32,
    I64,
    NUMBER,
    U32,
    U64,
    Act,
    after,
    bits,
    matched,
    operation,
    pair,
    predicate,
    put_wide,
    real,
    register,
    writes,
    writes_real,
)


@operation("MOV")
def _(i: Instruction, modifiers: set[str], o: list[str]) -> Act:
    to, value = o
    return writes(to, bits(value))


@operation("SEL")
def _(i: Instruction, modifiers: set[str], o: list[str]) -> Act:
    to, *values, condition = o
    first, second = map(bits, values)
    which = predicate(condition)
    return writes(to, lambda m, who: np.where(which(m, who), first(m, who), second(m, who)))


@operation("FSEL")
def _(i: Instruction, modifiers: set[str], o: list[str]) -> Act:
    to, *values, condition = o
    first, second = map(real, values)
    which = predicate(condition)
    return writes_real(to, lambda m, who: np.where(which(m, who), first(m, who), second(m, who)))


@operation("R2UR")
def _(i: Instruction, modifiers: set[str], o: list[str]) -> Act:
    name, source = o
    to, value = register(name), bits(matched(r"R\d+", source)[0])
    if to < UNIFORM:
        raise Unknown("destination")

    def act(m: Machine, who: Who) -> None:
        found, threads = value(m, who), np.arange(m.threads)[who]
        of_warp = np.zeros(m.threads // WARP, U32)
        of_warp[threads // WARP] = found
        if (of_warp[threads // WARP] != found).any():
            raise Fault("the threads of a warp have several values")
        everyone = m.whole_warps(threads)
        m.write(to, of_warp[everyone // WARP], everyone)

    return act


SPECIAL: dict[str, Callable[[Machine], np.ndarray]] = {
    "SR_TID.X": lambda m: m.thread,
    "SR_CTAID.X": lambda m: m.block,
}


@operation("S2R")
def _(i: Instruction, modifiers: set[str], o: list[str]) -> Act:
    to, name = o
    find = SPECIAL[name]
    return writes(to, lambda m, who: find(m)[who])


@operation("S2UR")
def _(i: Instruction, modifiers: set[str], o: list[str]) -> Act:
    name, source = o
    matched(r"SR_CTAID\.X", source)
    to = register(name)

    def act(m: Machine, who: Who) -> None:
        everyone = m.whole_warps(np.arange(m.threads)[who])
        m.write(to, m.block[everyone], everyone)

    return act


@operation("CS2R")
def _(i: Instruction, modifiers: set[str], o: list[str]) -> Act:
    name, source = o
    matched("SRZ", source)
    to = register(name)
    return lambda m, who: put_wide(m, to, np.zeros(m.count(who), U64), who)


@operation("LDC", "64")
def _(i: Instruction, modifiers: set[str], o: list[str]) -> Act:
    name, source = o
    to = register(name)
    index, offset = matched(rf"c\[0x0\]\[(?:(U?R\d+)\+)?({NUMBER})\]", source).groups()
    words, fixed = 2 if modifiers else 1, int(offset, 16)
    base = bits(index or "RZ")

    def act(m: Machine, who: Who) -> None:
        found = m.constants(base(m, who).view(I32).astype(I64) + fixed, words)
        for n, value in enumerate(found):
            m.write(after(to, n), value, who)

    return act


@operation("PRMT")
def _(i: Instruction, modifiers: set[str], o: list[str]) -> Act:
    to, first, selector, second = o
    a, b, which = bits(first), bits(second), int(matched(NUMBER, selector)[0], 16)
    if which & 0x8888 or which > 0xFFFF:
        raise Unknown("selector")

    def value(m: Machine, who: Who) -> np.ndarray:
        both = a(m, who).astype(U64) | b(m, who).astype(U64) << U64(32)
        taken = [(both >> U64(8 * (which >> 4 * n & 7)) & U64(255)) << U64(8 * n) for n in range(4)]
        return np.bitwise_or.reduce(taken).astype(U32)

    return writes(to, value)


# global memory


def access(i: Instruction, modifiers: set[str], where: str, first: str) -> tuple[Callable, list[int], int]:
    """What finds the checked addresses; the registers of the data; bytes of a register's part."""
    if "E" not in modifiers or len(modifiers) > 2:
        raise Unknown("modifiers")
    itemsize = 2 if "U16" in modifiers else 4
    count = 4 if "128" in modifiers else 2 if "64" in modifiers else 1
    descriptor, base, offset = matched(rf"desc\[(UR\d+)\]\[(R\d+)\.64(?:\+({NUMBER}))?\]", where).groups()
    of_all, address = pair(descriptor), pair(base)
    distance = U64(int(offset or "0", 16) & (1 << 64) - 1)

    def addresses(m: Machine, who: Who) -> np.ndarray:
        if (of_all(m, who) != m.descriptor.view(U64)).any():
            raise Fault("not the descriptor of global memory")
        found = address(m, who) + distance
        m.accesses.append(Access(i, np.arange(m.threads)[who], found, itemsize * count))
        return found

    start = register(first)
    if start % count and start not in (255, UNIFORM + 63):
        raise Unknown("registers of a wide access")
    return addresses, [after(start, n) for n in range(count)], itemsize


@operation("LDG", "E U16 64 128")
def _(i: Instruction, modifiers: set[str], o: list[str]) -> Act:
    first, where = o
    addresses, registers, itemsize = access(i, modifiers, where, first)

    def act(m: Machine, who: Who) -> None:
        found = m.memory.load(addresses(m, who), itemsize, len(registers))
        for to, value in zip(registers, found, strict=True):
            m.write(to, value, who)

    return act


@operation("STG", "E U16 64 128")
def _(i: Instruction, modifiers: set[str], o: list[str]) -> Act:
    where, first = o
    addresses, registers, itemsize = access(i, modifiers, where, first)
    kind = np.uint16 if itemsize == 2 else U32

    def act(m: Machine, who: Who) -> None:
        data = [m.registers[r, who].astype(kind) for r in registers]
        m.memory.store(addresses(m, who), itemsize, data)

    return act
