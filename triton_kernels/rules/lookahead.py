"""Slow weights (arXiv:1907.08610); the formula is in python/danlu/wrappers/lookahead.py."""

from __future__ import annotations

import triton
import triton.language as tl  # noqa: F401  the interpreter asks for it


@triton.jit
def lookahead(p, g, states, coefficients):
    (slow,) = states
    (alpha,) = coefficients
    slow = slow + alpha * (p - slow)
    return slow, (slow,)
