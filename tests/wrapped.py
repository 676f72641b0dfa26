"""The table of wrappers, with settings under which each of them acts within some steps."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import danlu
from cases import ALL, BACKENDS, Case
from oracles import nested

Optimizer = torch.optim.Optimizer


@dataclass(frozen=True)
class Wrapping:
    """What is put around an optimizer."""

    id: str
    make: Callable[[Optimizer], Any]
    period: int  # calls of step() after which it is where it began


WRAPPERS = [
    Wrapping("accumulation", lambda opt: danlu.GradientAccumulation(opt, 3), 3),
    Wrapping("lookahead", lambda opt: danlu.Lookahead(opt, k=3, alpha=0.4), 3),
    Wrapping("ema", lambda opt: danlu.EMA(opt, decay=0.9), 1),
    Wrapping(
        "three",
        lambda opt: danlu.GradientAccumulation(danlu.EMA(danlu.Lookahead(opt, k=2, alpha=0.3), decay=0.8), 2),
        4,
    ),
]
# torch's own, which the wrappers take, too
TORCH: dict[str, Callable[[Any], Optimizer]] = {
    "torch-sgd": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    "torch-adamw": lambda params: torch.optim.AdamW(params, lr=1e-2),
    "torch-adafactor": lambda params: torch.optim.Adafactor(params, lr=1e-2),
}
# an optimizer that accumulates by itself is not wrapped
WRAPPED: list[Case] = [case for case in ALL if case.hyper.get("accumulation_steps", 1) == 1]
BY_ID = {case.id: case for case in WRAPPED}
# inside the wrappers, of rows that have a gradient
LAZY: dict[str, Callable[..., Optimizer]] = {
    "lazy-adamw": lambda params, **engine: danlu.Lazy(BY_ID["adamw"].make(params, **engine)),
    "lazy-layer-lion": lambda params, **engine: danlu.Lazy(
        danlu.LayerAdaptation(BY_ID["lion"].make(params, **engine)), "params"
    ),
}
MAKERS: dict[str, Callable[..., Optimizer]] = {
    **{case.id: case.make for case in WRAPPED},
    **LAZY,
    **{name: lambda params, make=make, **_: make(params) for name, make in TORCH.items()},
}


def makers() -> list[tuple[str, str]]:
    """Every optimizer, on one backend after the other."""
    return [(name, _backend(i, name)) for i, name in enumerate(MAKERS)]


def wrapped_makers() -> list[Any]:
    """Every optimizer inside a wrapper, with --all inside each; and with each of them every backend."""
    return [
        pytest.param(
            (name, _backend(i + j, name), wrapping),
            marks=() if (i + j) % len(WRAPPERS) == 0 or name in ("adamw", "lamb") else pytest.mark.full,
        )
        for i, name in enumerate(MAKERS)
        for j, wrapping in enumerate(WRAPPERS)
    ]


def _backend(turn: int, name: str) -> str:
    return "cpu" if name in TORCH else BACKENDS[turn % len(BACKENDS)]


# The order, from the innermost outwards.

NESTED: dict[str, Callable[..., Any]] = {
    "LayerAdaptation": lambda opt, **_: danlu.LayerAdaptation(opt),
    "Lazy": lambda opt, mode="params": danlu.Lazy(opt, mode),
    "Lookahead": lambda opt, **_: danlu.Lookahead(opt, k=nested.K, alpha=nested.ALPHA),
    "EMA": lambda opt, **_: danlu.EMA(opt, decay=nested.MU),
    "GradientAccumulation": lambda opt, **_: danlu.GradientAccumulation(opt, nested.STEPS),
}
LEVEL = {"LayerAdaptation": 1, "Lazy": 2, "Lookahead": 3, "EMA": 3, "GradientAccumulation": 4}


def in_order(names: Sequence[str]) -> bool:
    """Each of them wraps those before it."""
    return all(
        LEVEL[inner] < LEVEL[outer] or {inner, outer} == {"EMA", "Lookahead"}
        for inner, outer in itertools.combinations(names, 2)
    )
