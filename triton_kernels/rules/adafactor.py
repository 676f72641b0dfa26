"""Adafactor (arXiv:1804.04235); the formula and its presets are in python/danlu/optimizers/adafactor.py.

A rule's direction sees the second moment, or in the place of its two averages x of the element's row and y
of its column: their inverse roots.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..storage import at_most_finite, larger, smaller


@triton.jit
def _averaged(v, square, coefficients):
    """The largest finite number stands for larger ones."""
    beta2, weight2, eps1, _, _, _, _, _, _, _, _, _, _, _ = coefficients
    return at_most_finite(beta2 * v + weight2 * (square + eps1))


# the second moment as a tensor


@triton.jit
def full(g, states, coefficients):
    _, _, _, floor, root_eps, _, _, _, _, _, _, _, _, _ = coefficients
    v = _averaged(states[0], g * g, coefficients)
    return tl.div_rn(g, larger(tl.sqrt_rn(v + root_eps), floor)), (v,)


# the second moment as averages over the columns and over the rows of a matrix


@triton.jit
def statistic(g, coefficients):
    return g * g


@triton.jit
def average(v, mean, coefficients):
    return _averaged(v, at_most_finite(mean).to(tl.float32), coefficients)


@triton.jit
def row_factor(r, mean, coefficients):
    """In float64: a quotient may be below fp32's range where its inverse root is not."""
    _, _, _, floor, _, _, _, _, _, _, _, _, _, _ = coefficients
    return (1.0 / tl.sqrt(r.to(tl.float64) / larger(mean, floor.to(tl.float64)))).to(tl.float32)


@triton.jit
def column_factor(c, coefficients):
    return (1.0 / tl.sqrt(c.to(tl.float64))).to(tl.float32)


@triton.jit
def factored(g, states, coefficients):
    _, _, _, floor, _, _, _, _, _, _, _, _, _, _ = coefficients
    x, y = states[0], states[1]
    bounded = g * smaller(x * y, tl.div_rn(1.0, floor))
    return tl.where(floor > 0, bounded, (g * x) * y), (x, y)


@triton.jit
def factored_root(g, states, coefficients):
    """eps once more, under the root."""
    _, _, _, _, root_eps, _, _, _, _, _, _, _, _, _ = coefficients
    x, y = states[0], states[1]
    z = (tl.sqrt_rn(root_eps) * x) * y
    return tl.div_rn((g * x) * y, tl.sqrt_rn(1.0 + z * z)), (x, y)


# norm_terms and step of each


@triton.jit
def needs_norms(coefficients):
    _, _, _, _, _, clip, _, _, scaled, _, _, _, _, _ = coefficients
    return (scaled != 0) | (clip < float("inf"))


@triton.jit
def norms_need_p(coefficients):
    _, _, _, _, _, _, _, _, scaled, _, _, _, _, _ = coefficients
    return scaled != 0


@triton.jit
def norm_terms_full(p, g, states, coefficients):
    u, _ = full(g, states, coefficients)
    return p * p, u * u


@triton.jit
def norm_terms_factored(p, g, states, coefficients):
    u, _ = factored(g, states, coefficients)
    return p * p, u * u


@triton.jit
def norm_terms_factored_root(p, g, states, coefficients):
    u, _ = factored_root(g, states, coefficients)
    return p * p, u * u


@triton.jit
def finalize(sums, n, coefficients):
    """Scales of the direction before and after the momentum, and of p."""
    _, _, _, _, _, clip, rho, eps2, scaled, late, _, _, decay, decay_alpha = coefficients
    of_p, of_u = sums
    size = n.to(tl.float64)
    clipped = 1.0 / larger(tl.full((), 1.0, tl.float64), tl.sqrt(of_u / size) / clip.to(tl.float64))
    alpha = rho.to(tl.float64)
    scaled_alpha = alpha * larger(eps2.to(tl.float64), tl.sqrt(of_p / size))
    alpha = tl.where(scaled != 0, scaled_alpha, alpha)
    of_decay = (decay.to(tl.float64) + decay_alpha.to(tl.float64) * alpha).to(tl.float32)
    inner = tl.where(late != 0, clipped, alpha * clipped).to(tl.float32)
    return inner, tl.where(late != 0, alpha.to(tl.float32), 1.0), of_decay


@triton.jit
def _plain(p, u, scales):
    inner, outer, decay = scales
    return outer * (inner * u) + decay * p


@triton.jit
def _with_momentum(p, u, m, coefficients, scales):
    _, _, _, _, _, _, _, _, _, _, beta1, weight1, _, _ = coefficients
    inner, outer, decay = scales
    m = beta1 * m + weight1 * (inner * u)
    return outer * m + decay * p, m


@triton.jit
def step_full(p, g, states, coefficients, scales):
    u, states = full(g, states, coefficients)
    return _plain(p, u, scales), states


@triton.jit
def step_full_momentum(p, g, states, coefficients, scales):
    u, (v,) = full(g, states, coefficients)
    amount, m = _with_momentum(p, u, states[1], coefficients, scales)
    return amount, (v, m)


@triton.jit
def step_factored(p, g, states, coefficients, scales):
    u, states = factored(g, states, coefficients)
    return _plain(p, u, scales), states


@triton.jit
def step_factored_momentum(p, g, states, coefficients, scales):
    u, (x, y) = factored(g, states, coefficients)
    amount, m = _with_momentum(p, u, states[2], coefficients, scales)
    return amount, (x, y, m)


@triton.jit
def step_factored_root(p, g, states, coefficients, scales):
    u, states = factored_root(g, states, coefficients)
    return _plain(p, u, scales), states


@triton.jit
def step_factored_root_momentum(p, g, states, coefficients, scales):
    u, (x, y) = factored_root(g, states, coefficients)
    amount, m = _with_momentum(p, u, states[2], coefficients, scales)
    return amount, (x, y, m)
