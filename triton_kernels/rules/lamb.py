"""LAMB (arXiv:1904.00962); the formula is in python/danlu/optimizers/lamb.py."""

from __future__ import annotations

import triton
import triton.language as tl

from .adam import adam_direction


@triton.jit
def _update(p, g, states, coefficients):
    m, v = states
    beta1, weight1, beta2, weight2, root2, eps, correction1, weight_decay, _, _, _ = coefficients
    direction, states = adam_direction(g, m, v, beta1, weight1, beta2, weight2, root2, eps)
    return correction1 * direction + weight_decay * p, states


@triton.jit
def needs_norms(coefficients):
    _, _, _, _, _, _, _, _, _, adapt, _ = coefficients
    return adapt != 0


@triton.jit
def norm_terms(p, g, states, coefficients):
    u, _ = _update(p, g, states, coefficients)
    return p * p, u * u


@triton.jit
def finalize(sums, n, coefficients):
    _, _, _, _, _, _, _, _, lr, _, max_ratio = coefficients
    of_p, of_u = sums
    found = (of_p > 0) & (of_u > 0)
    quotient = tl.sqrt(of_p) / tl.sqrt(tl.where(found, of_u, 1.0))
    ratio = tl.where(found, quotient.to(tl.float32), 1.0)
    return (lr * tl.where(ratio > max_ratio, max_ratio, ratio),)


@triton.jit
def step(p, g, states, coefficients, scales):
    (lr,) = scales
    u, states = _update(p, g, states, coefficients)
    return lr * u, states
