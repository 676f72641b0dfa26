"""Adam (arXiv:1412.6980) and AdamW (arXiv:1711.05101); formulas in python/danlu/optimizers/adam.py."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def adam_direction(g, m, v, beta1, weight1, beta2, weight2, root2, eps):
    """m / d with the bias correction of v inside d, and the moments."""
    m = beta1 * m + weight1 * g
    v = beta2 * v + (weight2 * g) * g  # g * g alone would overflow where v does not
    d = tl.sqrt_rn(v) * root2 + eps
    return tl.div_rn(m, d), (m, v)


@triton.jit
def adamw(p, g, states, coefficients):
    m, v = states
    beta1, weight1, beta2, weight2, lr1, root2, eps, decay = coefficients
    direction, states = adam_direction(g, m, v, beta1, weight1, beta2, weight2, root2, eps)
    return lr1 * direction + decay * p, states


@triton.jit
def adam(p, g, states, coefficients):
    m, v = states
    beta1, weight1, beta2, weight2, lr1, root2, eps, weight_decay = coefficients
    g = g + weight_decay * p
    direction, states = adam_direction(g, m, v, beta1, weight1, beta2, weight2, root2, eps)
    return lr1 * direction, states
