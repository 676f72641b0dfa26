"""Moving average of a parameter; the formula is in python/danlu/wrappers/ema.py."""

from __future__ import annotations

import triton
import triton.language as tl  # noqa: F401  the interpreter asks for it


@triton.jit
def average(p, g, states, coefficients):
    (mean,) = states
    (weight,) = coefficients
    return p, (mean + weight * (p - mean),)
