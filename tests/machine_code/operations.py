"""The PTX instructions that compute, one numpy function for each, over the threads that execute them.

What is not in the table is not known: an opcode, a type, or a modifier such as `.ftz` or `.approx`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np

from .memory import RAW, Fault
from .ptx import SIZES

Values = Any  # an array, or a scalar that all threads have
Function = Callable[..., Values]

DTYPES: dict[str, Any] = {
    "pred": np.bool_,
    **{kind: RAW[size] for kind, size in SIZES.items()},
    **{
        "s8": np.int8,
        "s16": np.int16,
        "s32": np.int32,
        "s64": np.int64,
        "f32": np.float32,
        "f64": np.float64,
    },
}
NAN16 = np.uint16(0x7FFF)  # what a conversion to 16 bits makes of NaN


def conversion(to: str, source: str, rounding: str | None) -> Function | None:
    """None if there is none of these types with this rounding."""
    known = {
        ("f32", "f16", None): _of_f16,
        ("f32", "bf16", None): _of_bf16,
        ("f64", "f16", None): lambda x: _of_f16(x).astype(np.float64),
        ("f64", "bf16", None): lambda x: _of_bf16(x).astype(np.float64),
        ("f64", "f32", None): lambda x: x.astype(np.float64),
        ("bf16", "f32", "rn"): _to_bf16,
        ("f16", "f32", "rn"): _to_f16,
        ("f32", "f64", "rn"): lambda x: x.astype(np.float32),
        ("f32", "s32", "rn"): lambda x: x.astype(np.float32),
        ("f64", "s64", "rn"): lambda x: x.astype(np.float64),
        ("s32", "f32", "rzi"): _to_s32,
    }
    if to[0] in "us" and source[0] in "us" and rounding is None:
        return lambda x: x.astype(DTYPES[to])
    return known.get((to, source, rounding))


def _to_bf16(x: Values) -> Values:
    """To nearest even."""
    bits = x.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), NAN16, rounded.astype(np.uint16))


def _of_bf16(x: Values) -> Values:
    return (x.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _to_f16(x: Values) -> Values:
    return np.where(np.isnan(x), NAN16, x.astype(np.float16).view(np.uint16))


def _of_f16(x: Values) -> Values:
    return x.view(np.float16).astype(np.float32)


def _to_s32(x: Values) -> Values:
    """Towards zero; the nearest for what is out of range, 0 for NaN."""
    x = np.where(np.isnan(x), 0.0, np.trunc(x.astype(np.float64)))
    return np.clip(x, -(2.0**31), 2.0**31 - 1).astype(np.int32)


def _pair(convert: Function) -> Function:
    def pair(high: Values, low: Values) -> Values:
        return convert(high).astype(np.uint32) << np.uint32(16) | convert(low).astype(np.uint32)

    return pair


def _ordered(a: Values, b: Values) -> Values:
    return (a == a) & (b == b)


COMPARISONS: dict[str, Function] = {
    "eq": operator.eq,
    "ne": lambda a, b: (a != b) & _ordered(a, b),
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
}
OF_FLOATS: dict[str, Function] = {  # true where one is NaN, but for the first
    "num": _ordered,
    "nan": lambda a, b: ~_ordered(a, b),
    "equ": lambda a, b: (a == b) | ~_ordered(a, b),
    "neu": operator.ne,
    "ltu": lambda a, b: ~(a >= b),
    "leu": lambda a, b: ~(a > b),
    "gtu": lambda a, b: ~(a <= b),
    "geu": lambda a, b: ~(a < b),
}


def _negative(x: Values) -> Values:
    """By the sign bit, NaN and zeros too."""
    raw = RAW[x.dtype.itemsize]
    return (x.view(raw) ^ raw(1 << 8 * x.dtype.itemsize - 1)).view(x.dtype)


def _fma(a: Values, b: Values, c: Values) -> Values:
    """Rounded once. The product of two numbers that fp32 can hold is exact."""
    result = np.atleast_1d(a * b + c)
    inexact = np.isfinite(result) & ~((a.astype(np.float32) == a) & (b.astype(np.float32) == b))
    for i in np.flatnonzero(inexact):
        x, y, z = (Fraction(float(v if v.ndim == 0 else v[i])) for v in (a, b, c))
        result[i] = float(x * y + z)
    return result


def _quotient(a: Values, b: Values) -> Values:
    """Towards zero."""
    if (b == 0).any():
        raise Fault("division by zero")
    below = a // b
    return below + ((below * b != a) & ((a < 0) ^ (b < 0))).astype(below.dtype)


def _remainder(a: Values, b: Values) -> Values:
    return a - _quotient(a, b) * b


def _shift(left: bool) -> Function:
    def shift(a: Values, count: Values) -> Values:
        width = 8 * a.dtype.itemsize
        inside = np.minimum(count, np.uint32(width - 1)).astype(a.dtype)
        if not left:
            last = a >> a.dtype.type(width - 1) if a.dtype.kind == "i" else a.dtype.type(0)
            return np.where(count < width, a >> inside, last)
        return np.where(count < width, a << inside, a.dtype.type(0))

    return shift


def _high(a: Values, b: Values) -> Values:
    """The upper half of a product."""
    product = a.astype(object) * b.astype(object)
    bits = 8 * a.dtype.itemsize
    wrapped = (product >> bits) & ((1 << bits) - 1)
    return wrapped.astype(RAW[a.dtype.itemsize]).view(a.dtype)


def _wide(a: Values, b: Values) -> Values:
    double = {"i": {2: np.int32, 4: np.int64}, "u": {2: np.uint32, 4: np.uint64}}
    kind = double[a.dtype.kind][a.dtype.itemsize]
    return a.astype(kind) * b.astype(kind)


def _field(x: Values, first: Values, length: Values) -> Values:
    """`bfe.u32`."""
    first, length = np.minimum(first & np.uint32(255), 32), np.minimum(length & np.uint32(255), 32)
    shifted = x.astype(np.uint64) >> first.astype(np.uint64)
    return (shifted & ((np.uint64(1) << length.astype(np.uint64)) - np.uint64(1))).astype(np.uint32)


def _permuted(a: Values, b: Values, selector: Values) -> Values:
    """`prmt.b32`: four bytes out of eight."""
    both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    result = np.uint32(0)
    for i in range(4):
        which = selector >> np.uint32(4 * i) & np.uint32(15)
        byte = (both >> (which & np.uint32(7)).astype(np.uint64) * np.uint64(8) & np.uint64(255)).astype(
            np.uint32
        )
        sign = np.where(byte & np.uint32(128), np.uint32(255), np.uint32(0))
        byte = np.where(which & np.uint32(8), sign, byte)
        result = result | byte << np.uint32(8 * i)
    return result


def _table() -> dict[str, tuple[Function, tuple[str, ...]]]:
    """Of every opcode the function, and the types of result and operands."""
    table: dict[str, tuple[Function, tuple[str, ...]]] = {}

    def add(opcode: str, function: Function, *kinds: str) -> None:
        table[opcode] = (function, kinds)

    for kind in ("f32", "f64"):
        for name in ("add", "subtract", "multiply", "divide"):
            short = {"subtract": "sub", "multiply": "mul", "divide": "div"}.get(name, name)
            add(f"{short}.rn.{kind}", getattr(np, name), kind, kind, kind)
        add(f"sqrt.rn.{kind}", np.sqrt, kind, kind)
        add(f"rcp.rn.{kind}", lambda x: x.dtype.type(1) / x, kind, kind)
        add(f"neg.{kind}", _negative, kind, kind)
        for name, compare in {**COMPARISONS, **OF_FLOATS}.items():
            add(f"setp.{name}.{kind}", compare, "pred", kind, kind)
    add("fma.rn.f64", _fma, "f64", "f64", "f64", "f64")

    for kind in ("s32", "s64", "u32", "u64"):
        functions = dict(
            add=np.add, sub=np.subtract, div=_quotient, rem=_remainder, min=np.minimum, max=np.maximum
        )
        for name, function in functions.items():
            add(f"{name}.{kind}", function, kind, kind, kind)
        add(f"mul.lo.{kind}", np.multiply, kind, kind, kind)
        add(f"mul.hi.{kind}", _high, kind, kind, kind)
        add(f"mad.lo.{kind}", lambda a, b, c: a * b + c, kind, kind, kind, kind)
        add(f"shr.{kind}", _shift(left=False), kind, kind, "u32")
        if kind[0] == "s":
            add(f"neg.{kind}", np.negative, kind, kind)
        if kind[1:] == "32":
            double = f"{kind[0]}64"
            add(f"mul.wide.{kind}", _wide, double, kind, kind)
            add(f"mad.wide.{kind}", lambda a, b, c: _wide(a, b) + c, double, kind, kind, double)
    for kind in ("s16", "s32", "s64", "u16", "u32", "u64", "b16", "b32", "b64"):
        for name, compare in COMPARISONS.items():
            if kind[0] != "b" or name in ("eq", "ne"):
                add(f"setp.{name}.{kind}", compare, "pred", kind, kind)

    for kind in ("pred", "b16", "b32", "b64"):
        for name in ("and", "or", "xor"):
            add(f"{name}.{kind}", getattr(np, f"bitwise_{name}"), kind, kind, kind)
        add(f"not.{kind}", np.invert, kind, kind)
    for kind in ("b32", "b64"):
        add(f"shl.{kind}", _shift(left=True), kind, kind, "u32")
    add("bfe.u32", _field, "u32", "u32", "u32", "u32")
    add("prmt.b32", _permuted, "b32", "b32", "b32", "b32")
    for kind in ("b32", "b64", "u32", "u64", "s32", "s64", "f32", "f64"):
        add(f"selp.{kind}", lambda a, b, p: np.where(p, a, b), kind, kind, kind, "pred")

    for to in DTYPES:
        for source in DTYPES:
            for rounding in (None, "rn", "rzi"):
                if found := conversion(to, source, rounding):
                    opcode = ".".join(filter(None, ("cvt", rounding, to, source)))
                    add(opcode, found, to, source)
    add("cvt.rn.bf16x2.f32", _pair(_to_bf16), "b32", "f32", "f32")
    add("cvt.rn.f16x2.f32", _pair(_to_f16), "b32", "f32", "f32")
    return table


TABLE = _table()
