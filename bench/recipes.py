"""Every optimizer with settings that suit the training benchmark, and what is wrapped around it."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

import danlu
from danlu.wrappers.order import Nested
from model import GPT

Wrapped = tuple[tuple[str, dict[str, Any]], ...]

# what may stand after a "+", and the settings that options change
WRAPPERS: dict[str, tuple[Callable[..., torch.optim.Optimizer], dict[str, Any]]] = {
    "layer": (danlu.LayerAdaptation, {}),
    "lazy": (danlu.Lazy, {"mode": "rows"}),
    "lookahead": (danlu.Lookahead, {"k": 5, "alpha": 0.5}),
    "ema": (danlu.EMA, {"decay": 0.98}),
    "accumulation": (danlu.GradientAccumulation, {}),
}

# of layer adaptation around any rule: a step is lr * |p| long
LAYER_LR = 1e-2


@dataclasses.dataclass(frozen=True)
class Recipe:
    """An optimizer with settings that suit this task; decay is for matrices only, and Amos brings its own.

    `wrappers` are those around it, innermost first, with their settings.
    """

    optimizer: type[torch.optim.Optimizer]
    lr: float
    weight_decay: float | None
    more: dict[str, Any] = dataclasses.field(default_factory=dict)
    wrappers: Wrapped = ()

    def make(self, model: GPT, accumulate: int) -> torch.optim.Optimizer:
        more = dict(self.more, accumulation_steps=accumulate) if self._is_bare_tiger else self.more
        optimizer = self.optimizer(self._groups(model), lr=self.lr, **more)
        for name, settings in self.wrappers:
            around, _ = WRAPPERS[name]
            optimizer = around(optimizer, **settings)
        return optimizer

    @property
    def accumulates(self) -> bool:
        """Whether the optimizer takes the parts of a batch one by one and needs no sum of gradients."""
        return self._is_bare_tiger or self._has("accumulation")

    @property
    def _is_bare_tiger(self) -> bool:
        return self.optimizer is danlu.Tiger and not self.wrappers

    def _groups(self, model: GPT) -> list[dict[str, Any]]:
        if self.optimizer is danlu.Amos:
            return danlu.amos_groups(model, mlp_outputs=["contract"])
        lazy = [torch.nn.Embedding] if self._has("lazy") else []
        return danlu.param_groups(model, self.weight_decay, lazy=lazy)

    def _has(self, wrapper: str) -> bool:
        return any(name == wrapper for name, _ in self.wrappers)


RECIPES = {
    "lion": Recipe(danlu.Lion, lr=3e-4, weight_decay=0.3, more=dict(betas=(0.9, 0.98))),
    "tiger": Recipe(danlu.Tiger, lr=3e-4, weight_decay=0.3),
    "adamw": Recipe(danlu.AdamW, lr=1e-3, weight_decay=0.1, more=dict(betas=(0.9, 0.98))),
    "adam": Recipe(danlu.Adam, lr=1e-3, weight_decay=0.0, more=dict(betas=(0.9, 0.98))),
    "adax": Recipe(danlu.AdaX, lr=1e-3, weight_decay=0.0),
    "adaxw": Recipe(danlu.AdaXW, lr=1e-3, weight_decay=0.1),
    "torch-adamw": Recipe(
        torch.optim.AdamW, lr=1e-3, weight_decay=0.1, more=dict(betas=(0.9, 0.98), fused=True)
    ),
    "adafactor": Recipe(danlu.Adafactor, lr=3e-2, weight_decay=0.0),
    "lamb": Recipe(danlu.LAMB, lr=LAYER_LR, weight_decay=0.1, more=dict(betas=(0.9, 0.98))),
    "amos": Recipe(danlu.Amos, lr=3e-3, weight_decay=None),
}

# `make bench` trains with these
DEFAULT = ["lion", "tiger", "adamw", "adam", "adax", "adaxw", "torch-adamw"]


def add_wrapper_options(parser: argparse.ArgumentParser) -> None:
    """An option for each setting of a wrapper, as --lookahead-k."""
    for wrapper, (kind, settings) in WRAPPERS.items():
        for setting, default in settings.items():
            parser.add_argument(
                f"--{wrapper}-{setting}",
                metavar=setting.upper(),
                type=type(default),
                default=default,
                help=f"of {kind.__name__} (default: %(default)s)",
            )


def recipe_of(name: str, options: argparse.Namespace) -> Recipe:
    """Of a name such as adamw+lookahead+ema.

    Raises:
        ValueError, TypeError: there is no such optimizer or wrapper, or the wrappers do not fit.
    """
    base, *wrappers = name.split("+")
    if base not in RECIPES:
        raise ValueError(f"must name some of {', '.join(RECIPES)}, got {base!r}")
    for wrapper in wrappers:
        if wrapper not in WRAPPERS:
            raise ValueError(f"may add {', '.join(WRAPPERS)} with a +, got {wrapper!r}")
    if "lazy" in wrappers and not options.untied:
        raise ValueError("with lazy needs --untied: a tied head gives every row of the embedding a gradient")

    def settings(wrapper: str) -> dict[str, Any]:
        if wrapper == "accumulation":
            return {"steps": options.accumulate}
        _, names = WRAPPERS[wrapper]
        return {name: getattr(options, f"{wrapper}_{name}") for name in names}

    found = dataclasses.replace(
        RECIPES[base], wrappers=tuple((wrapper, settings(wrapper)) for wrapper in wrappers)
    )
    if "layer" in wrappers:
        found = dataclasses.replace(found, lr=LAYER_LR)
    # wrappers say themselves what they wrap
    found.make(GPT(context=1, layers=1, width=32, untied=options.untied), options.accumulate)
    return found


def from_outside(optimizer: torch.optim.Optimizer) -> Iterator[torch.optim.Optimizer]:
    """The optimizer and those that it is around, one after the other."""
    while optimizer is not None:
        yield optimizer
        optimizer = getattr(optimizer, "optimizer", None)


@contextmanager
def shipped_weights(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Puts the weights in place that a user would ship: EMA's averages, Lookahead's slow ones.

    The outer one of the two decides.
    """
    if not isinstance(optimizer, Nested):
        yield
        return
    optimizer.eval()
    try:
        yield
    finally:
        optimizer.train()
