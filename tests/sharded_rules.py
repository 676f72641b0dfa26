"""Rules that need other ranks, over parameters that have names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import danlu

Named = dict[str, torch.nn.Parameter]

KINDS = {"embedding": "embedding", "norm": "vector", "one": "vector"}
REDUCED: dict[str, tuple[int, ...]] = {
    **{"embedding": (1,), "up": (1,), "down": (1,), "thin": (0,), "row": (0,), "large": (1,)},
    **{"conv": (1, 2, 3), "experts": (2,)},
}


def listed(params: Named) -> list[torch.nn.Parameter]:
    return list(params.values())


def with_kinds(params: Named) -> list[dict[str, Any]]:
    return [{"params": [p], "kind": KINDS.get(name, "matrix")} for name, p in params.items()]


def with_dims(params: Named) -> list[dict[str, Any]]:
    return [{"params": [p], "reduce_dims": REDUCED.get(name)} for name, p in params.items()]


Make = Callable[..., Any]
# with the all-reduces of a step over one group of ranks, where the host waits for their verdict
RULES: dict[str, tuple[Make, int]] = {
    "adafactor": (lambda params, **e: danlu.Adafactor(listed(params), **e), 2),
    "adafactor-momentum": (
        lambda params, **e: danlu.Adafactor(
            listed(params),
            lr=1e-2,
            beta1=0.9,
            weight_decay=0.1,
            scale_parameter=False,
            relative_step=False,
            **e,
        ),
        2,
    ),
    "adafactor-torch": (
        lambda params, **e: danlu.Adafactor(listed(params), preset="torch", lr=1e-2, weight_decay=0.1, **e),
        2,
    ),
    "adafactor-optax": (
        lambda params, **e: danlu.Adafactor(
            listed(params), preset="optax", lr=1e-2, min_dim_size_to_factor=4, **e
        ),
        2,
    ),
    "adafactor-big-vision": (
        lambda params, **e: danlu.Adafactor(
            listed(params), preset="big_vision", lr=1e-2, state_dtype=torch.float32, **e
        ),
        1,
    ),
    "adafactor-bert4keras": (
        lambda params, **e: danlu.Adafactor(listed(params), preset="bert4keras", **e),
        2,
    ),
    "adafactor-norm": (
        lambda params, **e: danlu.Adafactor(
            listed(params), preset="optax", lr=1e-2, min_dim_size_to_factor=4, max_grad_norm=0.5, **e
        ),
        2,
    ),
    "lamb": (lambda params, **e: danlu.LAMB(listed(params), lr=1e-2, **e), 1),
    "lamb-norm": (lambda params, **e: danlu.LAMB(listed(params), lr=1e-2, max_grad_norm=0.5, **e), 2),
    "amos": (lambda params, **e: danlu.Amos(with_dims(params), lr=1e-2, momentum=0.9, **e), 1),
    "amos-clip": (lambda params, **e: danlu.Amos(listed(params), lr=1e-2, clip_value=0.5, **e), 1),
    "layer-lion": (
        lambda params, **e: danlu.LayerAdaptation(danlu.Lion(listed(params), lr=1e-2, weight_decay=0.1, **e)),
        1,
    ),
    "layer-adamw": (lambda params, **e: danlu.LayerAdaptation(danlu.AdamW(listed(params), lr=1e-2, **e)), 1),
    "tiger": (lambda params, **e: danlu.Tiger(with_kinds(params), lr=1e-2, scale_parameter=True, **e), 1),
    "tiger-cycle": (
        lambda params, **e: danlu.Tiger(
            with_kinds(params), lr=1e-2, scale_parameter=True, accumulation_steps=3, **e
        ),
        1,
    ),
    "adamw-norm": (lambda params, **e: danlu.AdamW(listed(params), lr=1e-2, max_grad_norm=0.5, **e), 1),
    "adamw": (lambda params, **e: danlu.AdamW(listed(params), lr=1e-2, **e), 0),
}
# element-wise but for which rows take part
LAZY: dict[str, Make] = {
    "lazy-rows": lambda params, **e: danlu.Lazy(danlu.AdamW(listed(params), lr=1e-2, **e)),
    "lazy-params": lambda params, **e: danlu.Lazy(danlu.Lion(listed(params), lr=1e-2, **e), mode="params"),
    "lazy-layer": lambda params, **e: danlu.Lazy(
        danlu.LayerAdaptation(danlu.AdamW(listed(params), lr=1e-2, **e)), mode="params"
    ),
}
