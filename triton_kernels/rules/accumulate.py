"""One gradient of a mean; the formula is in python/danlu/wrappers/gradient_accumulation.py."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def accumulate(p, g, states, coefficients):
    (mean,) = states
    fresh, weight = coefficients
    term = weight * g
    return p, (tl.where(fresh != 0, term, mean + term),)
