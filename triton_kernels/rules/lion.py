"""Lion (arXiv:2302.06675); the formula is in python/danlu/optimizers/lion.py."""

from __future__ import annotations

import triton
import triton.language as tl  # noqa: F401  the interpreter asks for it

from ..storage import sign


@triton.jit
def lion(p, g, states, coefficients):
    (m,) = states
    beta1, weight1, beta2, weight2, lr, decay = coefficients
    c = beta1 * m + weight1 * g
    m = beta2 * m + weight2 * g
    return lr * sign(c) + decay * p, (m,)
