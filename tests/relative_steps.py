"""Adafactors whose groups have a schedule of their own, for tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import danlu
from training import some_params

Rho = Callable[[int], float]
# optimizers whose groups all have relative_step, and their rho
OWN: dict[str, tuple[dict[str, Any], Rho]] = {
    "huggingface": (dict(weight_decay=0.1), lambda t: min(1e-2, t**-0.5)),
    "warmup_init": (dict(warmup_init=True, beta1=0.9), lambda t: min(1e-6 * t, t**-0.5)),
    "bert4keras": (dict(preset="bert4keras", lr=None), lambda t: min(1e-2, t**-0.5)),
    "bert4keras, not scaled": (
        dict(preset="bert4keras", relative_step=True, scale_parameter=False),
        lambda t: 0.05 * min(1e-2, t**-0.5),
    ),
}
every_own = pytest.mark.parametrize("name", OWN)


def own(name: str, **options: Any) -> danlu.Adafactor:
    return danlu.Adafactor(some_params(3), **{**OWN[name][0], **options})


def jump(opt: danlu.Adafactor, step: int) -> None:
    """As if so many steps had been made."""
    for held in opt.state.values():
        held["step"].fill_(step)


def shown(opt: Any) -> list[float]:
    assert all(type(group["lr"]) is float for group in opt.param_groups)
    return [group["lr"] for group in opt.param_groups]
