"""fp32 as machine code computes it: fused, flushed, and approximated as loosely as a GPU may."""

from __future__ import annotations

import numpy as np

U32, F32 = np.uint32, np.float32
SMALLEST = F32(2.0**-126)  # normal number


def flushed(x: np.ndarray) -> np.ndarray:
    """Subnormal numbers become zeros of their sign."""
    return np.where(np.abs(x) < SMALLEST, np.copysign(F32(0), x), x)


def fused(a: np.ndarray, b: np.ndarray, c: np.ndarray, rounding: str = "RN") -> np.ndarray:
    """a * b + c, rounded once."""
    product, addend = a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64)
    total = product + addend
    part = total - product
    error = (product - (total - part)) + (addend - part)
    # rounded to odd, so that the second rounding gives what one alone would
    even = np.isfinite(total) & (error != 0) & (total.view(np.int64) & 1 == 0)
    total = np.where(even, np.nextafter(total, np.copysign(np.inf, error)), total)
    nearest = total.astype(F32)
    if rounding == "RN":
        return nearest
    down = np.where(nearest > total, np.nextafter(nearest, F32(-np.inf)), nearest)
    up = np.where(nearest < total, np.nextafter(nearest, F32(np.inf)), nearest)
    return {"RM": down, "RP": up, "RZ": np.where(total > 0, down, up)}[rounding]


def approximate(function: str, x: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """MUFU: a unit in the last place off for a reciprocal, two for that of a root.

    Whether subnormal numbers are flushed is left open, of the operand and of the result.
    """
    x = np.where(random.random(len(x)) < 0.5, flushed(x), x)
    wide = x.astype(np.float64)
    exact = (1 / wide if function == "RCP" else 1 / np.sqrt(wide)).astype(F32)
    off = 1 if function == "RCP" else 2
    moved = (exact.view(np.int32) + random.integers(-off, off + 1, len(x), dtype=np.int32)).view(F32)
    ordinary = (np.abs(exact) > 2 * SMALLEST) & (np.abs(exact) < F32(1e38))
    result = np.where(ordinary, moved, exact)
    return np.where(random.random(len(x)) < 0.5, flushed(result), result)


def needs_slow_division(a: np.ndarray, b: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """FCHK: where a quotient may leave the range of the fast way, and at times where it would not."""
    of_a, of_b = ((x.view(U32) >> U32(23) & U32(255)).astype(np.int32) for x in (a, b))
    unsafe = (of_a < 25) | (of_a == 255) | (of_b < 2) | (of_b > 251) | (np.abs(of_a - of_b) > 124)
    return unsafe | (random.random(len(a)) < 0.01)


def to_bf16(x: np.ndarray) -> np.ndarray:
    bits = x.view(U32)
    rounded = (bits + U32(0x7FFF) + (bits >> U32(16) & U32(1))) >> U32(16)
    return np.where(np.isnan(x), U32(0x7FFF), rounded)


def to_f16(x: np.ndarray) -> np.ndarray:
    return np.where(np.isnan(x), U32(0x7FFF), x.astype(np.float16).view(np.uint16).astype(U32))


def from_f16(bits: np.ndarray) -> np.ndarray:
    return bits.astype(np.uint16).view(np.float16).astype(F32)
