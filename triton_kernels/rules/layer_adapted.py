"""Layer adaptation, the mechanism of LAMB (arXiv:1904.00962), around an element-wise rule; the formula is in
python/danlu/wrappers/layer_adaptation.py.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl

from ...schedule import Reduction


def layer_adapted(rule: Any) -> Any:
    """The `Rule` that scales the steps of another."""
    return rule._replace(
        function=_calling(rule.function, _step),
        coefficients=(*rule.coefficients, "group_lr"),
        reduction=Reduction("none", sums=2),
        needs_norms=needs_norms,
        norm_terms=_calling(rule.function, _measure),
        finalize=finalize,
        scales=1,
    )


@triton.jit
def needs_norms(coefficients):
    return True


@triton.jit
def finalize(sums, n, coefficients):
    """lr may be 0, and the amount then is: the norms are tested before anything is divided."""
    group_lr = coefficients[-1]
    of_p, of_amount = sums
    found = (of_p > 0) & (of_amount > 0)
    quotient = tl.sqrt(of_p) * group_lr.to(tl.float64) / tl.sqrt(tl.where(found, of_amount, 1.0))
    return (tl.where(found, quotient.to(tl.float32), 1.0),)


RULE: Any = None  # of the function below that is copied: the rule that it calls


def _measure(p, g, states, coefficients):
    amount, _ = RULE(p, g, states, coefficients[:-1])
    return p * p, amount * amount


def _step(p, g, states, coefficients, scales):
    (ratio,) = scales
    amount, states = RULE(p, g, states, coefficients[:-1])
    return ratio * amount, states


def _calling(rule: Any, function: Callable[..., Any]) -> Any:
    """The Triton function with `rule` as RULE: a global of its own, since the interpreter loses closures."""
    names = {**function.__globals__, "RULE": rule}
    return triton.jit(types.FunctionType(function.__code__, names, function.__name__))
