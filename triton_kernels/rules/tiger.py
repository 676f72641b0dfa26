"""Tiger (Jianlin Su); the formula is in python/danlu/optimizers/tiger.py."""

from __future__ import annotations

import triton
import triton.language as tl

from ..storage import sign


@triton.jit
def tiger(p, g, states, coefficients):
    (m,) = states
    keep, weight, eta, decay = coefficients
    m = keep * m + weight * g
    return eta * sign(m) + decay * p, (m,)


# scale_parameter: eta is lr times the root mean square of a matrix, or of a row


@triton.jit
def needs_norms(coefficients):
    return True


@triton.jit
def norm_terms(p, g, states, coefficients):
    return (p * p,)


@triton.jit
def finalize(sums, n, coefficients):
    _, _, lr, weight_decay = coefficients
    (of_p,) = sums
    eta = lr * tl.sqrt(of_p / n.to(tl.float64)).to(tl.float32)
    return eta, eta * weight_decay


@triton.jit
def step(p, g, states, coefficients, scales):
    (m,) = states
    keep, weight, _, _ = coefficients
    eta, decay = scales
    m = keep * m + weight * g
    return eta * sign(m) + decay * p, (m,)
