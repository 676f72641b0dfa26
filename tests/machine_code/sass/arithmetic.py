"""Comparisons, fp32, and conversions of 16-bit formats."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from . import floats
from .machine import Instruction, Machine, Unknown, Who
from .operands import (
    F32,
    I32,
    U32,
    Act,
    Value,
    bits,
    integer,
    matched,
    operation,
    predicate,
    real,
    set_predicate,
    writes,
    writes_real,
)

COMPARISONS = {
    "LT": np.less,
    "LE": np.less_equal,
    "GT": np.greater,
    "GE": np.greater_equal,
    "EQ": np.equal,
    "NE": np.not_equal,
}


def compared(o: list[str], how: set[str], compare: Value) -> Act:
    """Two predicates are written: the comparison and its opposite, combined with a third one."""
    (name,) = how
    combine = {"AND": np.logical_and, "OR": np.logical_or}[name]
    first, second, *_ = o
    matched("U?PT", second)
    put, other = set_predicate(first), predicate(o[4])
    return lambda m, who: put(m, who, combine(compare(m, who), other(m, who)))


@operation("ISETP", "LT LE GT GE EQ NE U32 AND OR EX")
def _(i: Instruction, modifiers: set[str], o: list[str]) -> Act:
    (kind,) = modifiers & set(COMPARISONS)
    a, b = integer(o[2]), integer(o[3])
    signed = "U32" not in modifiers
    if len(o) != 5 + ("EX" in modifiers) or ("EX" in modifiers and kind != "NE"):
        raise Unknown("operands")
    lower = predicate(o[5]) if "EX" in modifiers else None

    def value(m: Machine, who: Who) -> np.ndarray:
        x, y = (v(m, who).view(I32 if signed else U32) for v in (a, b))
        found = COMPARISONS[kind](x, y)
        return found | lower(m, who) if lower else found

    return compared(o, modifiers & {"AND", "OR"}, value)


UNORDERED = {f"{kind}U": compare for kind, compare in COMPARISONS.items()}


@operation("FSETP", " ".join([*COMPARISONS, *UNORDERED, "NAN NUM FTZ AND OR"]))
def _(i: Instruction, modifiers: set[str], o: list[str]) -> Act:
    (kind,) = modifiers - {"FTZ", "AND", "OR"}
    a, b = map(real, o[2:4])
    if len(o) != 5:
        raise Unknown("operands")
    flush = floats.flushed if "FTZ" in modifiers else lambda x: x

    def value(m: Machine, who: Who) -> np.ndarray:
        x, y = flush(a(m, who)), flush(b(m, who))
        unordered = np.isnan(x) | np.isnan(y)
        if kind in ("NAN", "NUM"):
            return unordered == (kind == "NAN")
        if kind in UNORDERED:
            return UNORDERED[kind](x, y) | unordered
        return COMPARISONS[kind](x, y) & ~unordered

    return compared(o, modifiers & {"AND", "OR"}, value)


# fp32


def arithmetic(modifiers: set[str], o: list[str], compute: Callable[..., np.ndarray]) -> Act:
    to, *values = o
    first, second = map(real, values)
    flush = floats.flushed if "FTZ" in modifiers else lambda x: x
    return writes_real(to, lambda m, who: flush(compute(flush(first(m, who)), flush(second(m, who)))))


@operation("FADD", "FTZ")
def _(i: Instruction, modifiers: set[str], o: list[str]) -> Act:
    return arithmetic(modifiers, o, np.add)


@operation("FMUL", "FTZ")
def _(i: Instruction, modifiers: set[str], o: list[str]) -> Act:
    return arithmetic(modifiers, o, np.multiply)


@operation("FFMA", "RM RP RZ")
def _(i: Instruction, modifiers: set[str], o: list[str]) -> Act:
    to, *values = o
    a, b, c = map(real, values)
    (rounding,) = modifiers or {"RN"}
    return writes_real(to, lambda m, who: floats.fused(a(m, who), b(m, who), c(m, who), rounding))


@operation("MUFU", "RCP RSQ")
def _(i: Instruction, modifiers: set[str], o: list[str]) -> Act:
    to, text = o
    (function,), value = modifiers, real(text)
    return writes_real(to, lambda m, who: floats.approximate(function, value(m, who), m.random))


@operation("FCHK")
def _(i: Instruction, modifiers: set[str], o: list[str]) -> Act:
    to, *values = o
    a, b = map(real, values)
    put = set_predicate(to)
    return lambda m, who: put(m, who, floats.needs_slow_division(a(m, who), b(m, who), m.random))


# formats of 16 bits


@operation("F2FP", "BF16 F16 F32 PACK_AB")
def _(i: Instruction, modifiers: set[str], o: list[str]) -> Act:
    to, *values = o
    high, low = map(real, values)
    (kind,) = modifiers & {"BF16", "F16"}
    if not modifiers >= {"F32", "PACK_AB"}:
        raise Unknown("modifiers")
    convert = floats.to_bf16 if kind == "BF16" else floats.to_f16
    return writes(to, lambda m, who: convert(high(m, who)) << U32(16) | convert(low(m, who)))


@operation("HADD2", "F32")
def _(i: Instruction, modifiers: set[str], o: list[str]) -> Act:
    """One half of a register, widened."""
    to, zero, half = o
    matched("-RZ", zero)
    name, which = matched(r"(R\d+)\.H([01])_H\2", half.replace(".reuse", "")).groups()
    value, shift = bits(name), U32(16 * int(which))
    return writes_real(to, lambda m, who: F32(-0.0) + floats.from_f16(value(m, who) >> shift & U32(0xFFFF)))


@operation("HFMA2", "MMA")
def _(i: Instruction, modifiers: set[str], o: list[str]) -> Act:
    """As ptxas writes constants: two halves."""
    to, *zeros, high, low = o
    if [x.lstrip("-") for x in zeros] != ["RZ", "RZ"]:
        raise Unknown("operands")
    if "-0" in (high, low):
        raise Unknown("a sum of zeros")
    upper, lower = (np.float16(float(x)) for x in (high, low))
    number = int(upper.view(np.uint16)) << 16 | int(lower.view(np.uint16))
    return writes(to, bits(hex(number)))
