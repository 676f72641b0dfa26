"""The table that every test reads: optimizers with settings, storage formats, values."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

import danlu
from danlu.testing import same_bits

# Triton's kernels are interpreted in a process of their own, CUDA's run in the emulator
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BACKENDS = ["triton"] if INTERPRETED else ["cpu", "reference", "cuda"]

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64


@dataclass(frozen=True)
class Case:
    """An optimizer with settings under which every term of its formula counts."""

    id: str
    optimizer: type[danlu.FusedOptimizer]
    hyper: dict[str, Any] = field(default_factory=dict)
    adapted: bool = False  # inside LayerAdaptation

    def make(self, params: Any, **engine: Any) -> danlu.FusedOptimizer:
        made = self.optimizer(params, **{**self.hyper, **engine})
        return danlu.LayerAdaptation(made) if self.adapted else made

    @property
    def reduces(self) -> bool:
        return self not in CASES

    def agrees(self, a: torch.Tensor, b: torch.Tensor) -> bool:
        """Whether two backends' results are as equal as they must be."""
        if not self.reduces:
            return same_bits(a, b)
        # of 16 bits one step to the next number; in fp32 room for what cancels in a momentum
        rounding = torch.finfo(a.dtype).eps if a.dtype in (BF16, F16) else 3e-6
        largest = b.double().abs().max().item() if b.numel() else 0.0
        difference = (a.double() - b.double()).abs().max().item() if b.numel() else 0.0
        return a.dtype == b.dtype and difference <= rounding * largest


CASES = [
    Case("lion", danlu.Lion, dict(lr=3e-3, betas=(0.9, 0.98), weight_decay=0.1)),
    Case("tiger", danlu.Tiger, dict(lr=3e-3, beta=0.95, weight_decay=0.1)),
    Case("tiger-accumulate", danlu.Tiger, dict(lr=3e-3, weight_decay=0.1, accumulation_steps=3)),
    Case("adam", danlu.Adam, dict(lr=2e-3, weight_decay=0.05)),
    Case("adamw", danlu.AdamW, dict(lr=2e-3, betas=(0.8, 0.95), weight_decay=0.1)),
    Case("adax", danlu.AdaX, dict(lr=2e-3, weight_decay=0.05)),
    Case("adax-hat", danlu.AdaX, dict(lr=2e-3, eps=1e-8, weight_decay=0.05, eps_mode="hat")),
    Case("adax-inside", danlu.AdaX, dict(lr=2e-3, eps=1e-8, weight_decay=0.05, eps_mode="inside")),
    Case("adaxw", danlu.AdaXW, dict(lr=2e-3, betas=(0.8, 1e-2), weight_decay=0.1)),
    Case("adaxw-hat", danlu.AdaXW, dict(lr=2e-3, eps=1e-8, weight_decay=0.1, eps_mode="hat")),
    Case("adaxw-inside", danlu.AdaXW, dict(lr=2e-3, eps=1e-8, weight_decay=0.1, eps_mode="inside")),
]

# rules that sum over tensors: deterministic, and close to float64, instead of the same bits everywhere
LAYERED = {case.id: replace(case, id=f"layer-{case.id}", adapted=True) for case in CASES}
REDUCING = [
    Case("adafactor", danlu.Adafactor, dict(lr=2e-3, weight_decay=0.1)),
    Case("adafactor-momentum", danlu.Adafactor, dict(lr=2e-3, beta1=0.8, weight_decay=0.1)),
    Case("adafactor-torch", danlu.Adafactor, dict(preset="torch", lr=5e-2, weight_decay=0.1)),
    Case("adafactor-optax", danlu.Adafactor, dict(preset="optax", lr=2e-2, beta1=0.9, weight_decay=1e-3)),
    Case("adafactor-big-vision", danlu.Adafactor, dict(preset="big_vision", lr=2e-3, weight_decay=1e-3)),
    Case("lamb", danlu.LAMB, dict(lr=2e-3, betas=(0.8, 0.95), weight_decay=0.1)),
    Case("tiger-matrix", danlu.Tiger, dict(lr=3e-3, weight_decay=0.1, scale_parameter=True, kind="matrix")),
    Case("tiger-rows", danlu.Tiger, dict(lr=3e-3, weight_decay=0.1, scale_parameter=True, kind="embedding")),
    Case("amos", danlu.Amos, dict(lr=2e-2, eta=0.5)),
    Case("amos-momentum", danlu.Amos, dict(lr=2e-2, eta=0.5, momentum=0.8, extra_l2=0.01, clip_value=1.5)),
    Case("amos-full", danlu.Amos, dict(lr=2e-2, eta=0.5, momentum=0.8, reduce_dims=())),
    *(LAYERED[name] for name in ("tiger-accumulate", "adamw")),
]
ALL = CASES + REDUCING
# what the kernels have besides: with these every kind of statistic
EVERY_REDUCING = [
    *REDUCING,
    Case("adafactor-root", danlu.Adafactor, dict(preset="bert4keras", lr=2e-3)),
    Case("adafactor-root-momentum", danlu.Adafactor, dict(preset="bert4keras", lr=2e-3, beta1=0.8)),
    Case("lamb-not-adapted", danlu.LAMB, dict(lr=2e-3, weight_decay=0.1, always_adapt=False)),
    Case("amos-rows", danlu.Amos, dict(lr=2e-2, eta=0.5, extra_l2=0.01, reduce_dims=(-1,))),
    Case("amos-rows-momentum", danlu.Amos, dict(lr=2e-2, eta=0.5, reduce_dims=(-1,), momentum=0.8)),
    Case("amos-columns", danlu.Amos, dict(lr=2e-2, eta=0.5, clip_value=1.5, reduce_dims=(-2,))),
    Case("amos-columns-momentum", danlu.Amos, dict(lr=2e-2, eta=0.5, reduce_dims=(-2,), momentum=0.8)),
]
# the same passes around the other element-wise rules
OTHER_LAYERED = [LAYERED[name] for name in ("lion", "adam", "adax", "adax-inside", "adaxw", "adaxw-inside")]

# every optimizer once; with --all every case, also those that have another's states and settings
LIKE_ANOTHER = {
    *("adax", "adax-inside", "adaxw-hat", "adaxw-inside", "adafactor-torch", "adafactor-optax"),
    *("adafactor-big-vision", "tiger-matrix", "amos", "amos-full"),
}
EACH_STATE = [
    pytest.param(case, id=case.id, marks=pytest.mark.full if case.id in LIKE_ANOTHER else ()) for case in ALL
]


@dataclass(frozen=True)
class Storage:
    """dtypes of parameter, gradient and first moment; second moments are fp32."""

    param: torch.dtype
    grad: torch.dtype
    moment: torch.dtype

    @property
    def id(self) -> str:
        short = {F32: "f32", BF16: "bf16", F16: "f16"}
        return "-".join(short[d] for d in (self.param, self.grad, self.moment))


STORAGES = [
    Storage(F32, F32, F32),
    Storage(BF16, BF16, F32),
    Storage(BF16, F32, F32),
    Storage(BF16, BF16, BF16),
    Storage(F16, F16, F32),
    Storage(F16, F32, F32),
    Storage(F32, BF16, F32),
    Storage(F32, F32, BF16),
    Storage(F16, F16, F16),
]

OFTEN = {"lion", "tiger-accumulate", "adamw"}


def stored(storages: Sequence[Storage]) -> list[Any]:
    """Every element-wise rule in fp32 and 16 bits, each list of states in every storage; with --all all."""
    return [
        pytest.param(
            case,
            storage,
            id=f"{case.id}-{storage.id}",
            marks=() if case.id in OFTEN or storage in (STORAGES[0], STORAGES[3]) else pytest.mark.full,
        )
        for case in CASES
        for storage in storages
    ]


# what fp32 arithmetic treats specially: zeros, subnormals, the edges of the range, infinities, NaN
SPECIAL = torch.tensor(
    [0.0, -0.0, 1e-45, -1e-45, 1.2e-38, -6e-39, 3e38, -3e38, float("inf"), float("-inf"), float("nan")]
)
POWERS_OF_TEN = torch.tensor([10.0**k for k in range(-44, 18)])


def values(shape: Sequence[int], seed: int, *, wild: bool = True) -> torch.Tensor:
    """Reproducible fp32 numbers; `wild` ones span the exponents and include every special value."""
    made = _values if math.prod(shape) <= 1 << 18 else _values.__wrapped__
    return made(tuple(shape), seed, wild).clone()


@functools.lru_cache(maxsize=512)  # most of some tests' time was spent here
def _values(shape: tuple[int, ...], seed: int, wild: bool) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    if wild:
        # a table: torch's pow gives other bits at the ends of each thread's share
        x = x * POWERS_OF_TEN[torch.randint(0, len(POWERS_OF_TEN), shape, generator=generator)]
        which = torch.randint(0, 8 * len(SPECIAL), shape, generator=generator)
        x = torch.where(which < len(SPECIAL), SPECIAL[which.clamp(max=len(SPECIAL) - 1)], x)
    return x


def set_gradient(p: torch.Tensor, g: torch.Tensor) -> None:
    """Assigns a gradient of any floating dtype, as mixed-precision training does."""
    if g.dtype != p.dtype:
        p.grad_dtype = g.dtype  # type: ignore[attr-defined]
    p.grad = g
