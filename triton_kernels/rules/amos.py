"""Amos (arXiv:2210.11693); the formula is in python/danlu/optimizers/amos.py."""

from __future__ import annotations

import triton
import triton.language as tl

from ..storage import at_most_finite, larger


@triton.jit
def _clipped(g, coefficients):
    """NaN stays."""
    _, _, _, _, _, _, _, _, clip, _, _ = coefficients
    low = tl.where(g < -clip, -clip, g)
    return tl.where(low > clip, clip, low)


@triton.jit
def _averaged(v, b, square, coefficients):
    """v and b after another square, and what multiplies p and g in a step."""
    beta, weight, correction, xi_squared, c_rate, d_rate, scale, extra_l2, _, _, _ = coefficients
    v = beta * v + weight * square
    rv = tl.div_rn(correction, larger(v, 2.0**-125))
    c = tl.div_rn(1.0, tl.sqrt_rn(1.0 + c_rate * b))
    gamma = ((c * xi_squared) * rv) * square
    d = tl.div_rn(1.0, 1.0 + d_rate * b)
    of_p = d * (gamma * 0.5 + extra_l2)
    of_g = d * (scale * tl.sqrt_rn(rv))
    return v, b + gamma * (1.0 + b), of_p, of_g


@triton.jit
def _with_momentum(u, m, coefficients):
    _, _, _, _, _, _, _, _, _, momentum, momentum_weight = coefficients
    return momentum * m + momentum_weight * u


# one v and one b for each element


@triton.jit
def _elementwise(p, g, v, b, coefficients):
    c = _clipped(g, coefficients)
    v, b, of_p, of_g = _averaged(v, b, c * c, coefficients)
    return of_p * p + of_g * c, v, b


@triton.jit
def elementwise(p, g, states, coefficients):
    v, b = states
    u, v, b = _elementwise(p, g, v, b, coefficients)
    return u, (v, b)


@triton.jit
def elementwise_momentum(p, g, states, coefficients):
    v, b, m = states
    u, v, b = _elementwise(p, g, v, b, coefficients)
    m = _with_momentum(u, m, coefficients)
    return m, (v, b, m)


# One v and one b for each row of a matrix, or for each column. In their place the pass over elements sees
# what multiplies p and g.


@triton.jit
def statistic(g, coefficients):
    c = _clipped(g, coefficients)
    return c * c


@triton.jit
def average_pair(v, b, mean, coefficients):
    return _averaged(v, b, at_most_finite(mean).to(tl.float32), coefficients)


@triton.jit
def reduced(p, g, states, coefficients):
    of_p, of_g = states
    return of_p * p + of_g * _clipped(g, coefficients), states


@triton.jit
def reduced_momentum(p, g, states, coefficients):
    of_p, of_g, m = states
    u = of_p * p + of_g * _clipped(g, coefficients)
    m = _with_momentum(u, m, coefficients)
    return m, (of_p, of_g, m)
