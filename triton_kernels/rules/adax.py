"""AdaX and AdaXW (arXiv:2004.09740); the formulas are in python/danlu/optimizers/adax.py."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _moments(g, states, beta1, weight1, weight_t):
    """m without bias correction, and v as the paper's divided by its normaliser."""
    m, v = states
    # g * g alone would overflow where v does not
    return beta1 * m + weight1 * g, v + ((weight_t * g) * g - weight_t * v)


@triton.jit
def adaxw(p, g, states, coefficients):
    beta1, weight1, weight_t, eps_t, lr, decay = coefficients
    m, v = _moments(g, states, beta1, weight1, weight_t)
    return lr * tl.div_rn(m, tl.sqrt_rn(v) + eps_t) + decay * p, (m, v)


@triton.jit
def adax(p, g, states, coefficients):
    beta1, weight1, weight_t, eps_t, lr, weight_decay = coefficients
    m, v = _moments(g + weight_decay * p, states, beta1, weight1, weight_t)
    return lr * tl.div_rn(m, tl.sqrt_rn(v) + eps_t), (m, v)


@triton.jit
def adaxw_inside(p, g, states, coefficients):
    beta1, weight1, weight_t, eps, lr, decay = coefficients
    m, v = _moments(g, states, beta1, weight1, weight_t)
    return lr * tl.div_rn(m, tl.sqrt_rn(v + eps)) + decay * p, (m, v)


@triton.jit
def adax_inside(p, g, states, coefficients):
    beta1, weight1, weight_t, eps, lr, weight_decay = coefficients
    m, v = _moments(g + weight_decay * p, states, beta1, weight1, weight_t)
    return lr * tl.div_rn(m, tl.sqrt_rn(v + eps)), (m, v)
