"""Tiger (Jianlin Su); the formula is in python/danlu/optimizers/tiger.py."""

from __future__ import annotations

import triton
import triton.language as tl  # noqa: F401  the interpreter asks for it

from ..storage import sign


@triton.jit
def tiger(p, g, states, coefficients):
    (m,) = states
    keep, weight, eta, decay = coefficients
    m = keep * m + weight * g
    return eta * sign(m) + decay * p, (m,)
