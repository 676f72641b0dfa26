"""Optimizers made of a rule of one's own."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from . import checks, scalar, state
from .backends.triton import register_rule
from .optimizer import FusedOptimizer, Params

_numbers = itertools.count()


def custom(
    name: str,
    *,
    states: Sequence[str],
    defaults: Mapping[str, Any],
    reference: Callable[..., torch.Tensor],
    coefficients: Callable[..., dict[str, Any]],
    triton_rule: Any = None,
    check: Callable[..., None] | None = None,
) -> type[FusedOptimizer]:
    """A `FusedOptimizer` class with parameter groups, state_dict, schedulers, scaling and clipping.

    Args:
        name: of the class.
        states: names of the states of the parameter's shape, in the order in which the rule takes them; at
            most 4. `state_dtype` is the dtype of one called `exp_avg`, the others are float32.
        defaults: the hyper-parameters and their defaults; `lr` is one of them.
        reference: `reference(p, g, *states, step, **hyper)`, plain torch: updates the states in place and
            returns the amount to subtract from p. It leaves p and g alone.
        coefficients: `coefficients(math, *, step, **hyper)`: the numbers that the Triton rule takes, in its
            order, from + - * / and the functions of `danlu.scalar`, which `math` is.
        triton_rule: `rule(p, g, states, coefficients)`, a `triton.jit` function on fp32 blocks: returns the
            amount to subtract and the tuple of new states. It divides by `tl.div_rn` and takes roots by
            `tl.sqrt_rn`, so that it gives the reference's bits. None: the optimizer runs as reference.
        check: `check(**hyper)` raises ValueError for what is out of range; by default only lr is looked at.

    The class takes its hyper-parameters by keyword, lr also as second argument, and the options of every
    danlu optimizer. A module that is pickled has to hold it under its name.

    Raises:
        ValueError: a name is taken or missing.
    """
    _validate(states, defaults)

    def init(self: FusedOptimizer, params: Params, lr: Any = defaults["lr"], **options: Any) -> None:
        hyper = {key: options.pop(key, default) for key, default in defaults.items() if key != "lr"}
        FusedOptimizer.__init__(self, params, {"lr": lr, **hyper}, **options)

    cls: type[FusedOptimizer] = type(
        name,
        (FusedOptimizer,),
        dict(
            __init__=init,
            __doc__=reference.__doc__,
            __module__=sys._getframe(1).f_globals.get("__name__", "__main__"),
            state_names=tuple(states),
            reference=staticmethod(reference),
            coefficients=staticmethod(coefficients),
            check=staticmethod(check or _check_lr),
        ),
    )
    unknown = set(cls._hyper_names) ^ set(defaults)
    if unknown:
        raise ValueError(f"coefficients and defaults must name the same hyper-parameters, not {unknown}")
    cls._rule = f"{name}#{next(_numbers)}"  # no other rule's, whatever the name
    if triton_rule is not None:
        names = coefficients(scalar, **dict.fromkeys(cls._counter_names, 1.0), **defaults)
        register_rule(cls._rule, triton_rule, tuple(names))
    return cls


def _validate(states: Sequence[str], defaults: Mapping[str, Any]) -> None:
    if isinstance(states, str) or not states:
        raise ValueError(f"states must be a list of at least one name, got {states!r}")
    for key in states:
        if not key.isidentifier() or key in state.COUNTERS:
            raise ValueError(f"states must be identifiers other than {state.COUNTERS}, got {key!r}")
    if len(set(states)) < len(states):
        raise ValueError(f"states must differ, got {states!r}")
    if "lr" not in defaults:
        raise ValueError(f"defaults must have 'lr', got {sorted(defaults)}")
    taken = {"params", "maximize", *state.COUNTERS} & set(defaults)
    if taken:
        raise ValueError(f"defaults must not name {', '.join(sorted(taken))}")


def _check_lr(*, lr: Any, **others: Any) -> None:
    checks.learning_rate(lr)
