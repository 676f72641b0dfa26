"""The table of wrappers, with settings under which each of them acts within some steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import danlu
from cases import ALL, BACKENDS, Case

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
MAKERS: dict[str, Callable[..., Optimizer]] = {
    **{case.id: case.make for case in WRAPPED},
    **{name: lambda params, make=make, **_: make(params) for name, make in TORCH.items()},
}


def makers() -> list[tuple[str, str]]:
    """Every optimizer on every backend that it has here."""
    ours = [(case.id, backend) for case in WRAPPED for backend in BACKENDS]
    return ours if BACKENDS == ["triton"] else [*ours, *((name, "cpu") for name in TORCH)]
