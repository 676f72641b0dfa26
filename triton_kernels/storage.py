"""Loads and stores of elements of arrays, and the words that rules share."""

from __future__ import annotations

import triton
import triton.language as tl

# The interpreter truncates fp32 to bf16 where a GPU rounds, and reads bf16 subnormals wrongly; there the
# conversions are bit operations.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
LARGEST = tl.constexpr((2 - 2**-23) * 2.0**127)  # of fp32


@triton.jit
def load(pointers, mask):
    """fp32 values; without a mask the accesses are 16 bytes wide."""
    if INTERPRETED and mask is None:
        _check_aligned(pointers)
    if INTERPRETED and pointers.dtype.element_ty == tl.bfloat16:
        bits = tl.load(pointers.to(tl.pointer_type(tl.uint16), bitcast=True), mask=mask)
        return (bits.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return tl.load(pointers, mask=mask).to(tl.float32)


@triton.jit
def store(pointers, values, mask):
    """Rounded once, to nearest even."""
    if INTERPRETED and pointers.dtype.element_ty == tl.bfloat16:
        tl.store(pointers, _rounded(values), mask=mask)
    else:
        tl.store(pointers, values.to(pointers.dtype.element_ty), mask=mask)


@triton.jit
def _check_aligned(pointers):
    """A GPU faults at a wide access to another address, the interpreter would not notice."""
    tl.assume(tl.min(pointers.to(tl.int64), 0) % 16 == 0)


@triton.jit
def _rounded(x):
    bits = x.to(tl.uint32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    rounded = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FFF, rounded)
    return rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def sign(x):
    """1, -1, +0 at either zero, NaN for NaN."""
    return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, tl.where(x == x, 0.0, x)))


@triton.jit
def larger(a, b):
    """NaN if either is."""
    return tl.where((a > b) | (a != a), a, b)


@triton.jit
def smaller(a, b):
    return tl.where((a < b) | (a != a), a, b)


@triton.jit
def at_most_finite(x):
    """fp32's largest number stands for those beyond it; NaN stays."""
    return tl.where(x > LARGEST, LARGEST, x)
