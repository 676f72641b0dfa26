"""Wrappers around optimizers of each kind, for tests of what frameworks do with them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

import danlu
from wrapped import WRAPPERS, Wrapping

AROUND = [
    *WRAPPERS,
    Wrapping("ema-lookahead", lambda opt: danlu.EMA(danlu.Lookahead(opt, k=3, alpha=0.4), decay=0.9), 3),
    Wrapping("lookahead-ema", lambda opt: danlu.Lookahead(danlu.EMA(opt, decay=0.9), k=2, alpha=0.4), 2),
]
INSIDE: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda params: danlu.AdamW(params, lr=1e-2, weight_decay=0.1),
    "lamb": lambda params: danlu.LAMB(params, lr=1e-2),
    "tiger": lambda params: danlu.Tiger(params, lr=1e-2),
    "lazy": lambda params: danlu.Lazy(danlu.AdamW(params, lr=1e-2)),
    "layer": lambda params: danlu.LayerAdaptation(danlu.Lion(params, lr=1e-2)),
    "lazy-layer": lambda params: danlu.Lazy(danlu.LayerAdaptation(danlu.AdamW(params, lr=1e-2)), "params"),
    "torch-sgd": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=0.1),
    "torch-adamw": lambda params: torch.optim.AdamW(params, lr=1e-2),
    "torch-adam": lambda params: torch.optim.Adam(params, lr=1e-2, weight_decay=0.1),
    "torch-nadam": lambda params: torch.optim.NAdam(params, lr=1e-2),
    "torch-rmsprop": lambda params: torch.optim.RMSprop(params, lr=1e-2, momentum=0.5, centered=True),
}


def wrappings_around(names: Iterable[str], every: int = 1) -> list[tuple[str, Wrapping]]:
    """All pairs, or so many that each name and each wrapping has its turn."""
    return [
        (name, wrapping)
        for i, name in enumerate(names)
        for j, wrapping in enumerate(AROUND)
        if (i + j) % every == 0
    ]


def all_of(opt: Any) -> list[torch.Tensor]:
    """Copies of the parameters, and of all that a state_dict holds of them in the order of its keys."""
    saved = opt.state_dict()["state"]
    states = [saved[index][key] for index in sorted(saved) for key in sorted(saved[index])]
    params = [p for group in opt.param_groups for p in group["params"]]
    return [torch.as_tensor(x).detach().clone() for x in (*params, *states) if x is not None]
