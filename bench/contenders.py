"""The optimizers that are compared, and what a step of each has to read and write."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import torch

import danlu
from baselines import PlainLion, compiled_adafactor, compiled_adamw

F32, BF16 = torch.float32, torch.bfloat16
BASELINE = "torch-adamw"


@dataclasses.dataclass(frozen=True)
class Contender:
    """An optimizer, and what its step has to read and write of every element."""

    id: str
    make: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]
    written: int  # arrays read and written: the parameter and states of its shape
    bytes: int  # read and written for an element, were each touched once in every pass
    dtype: torch.dtype = F32
    read_again: int = 0  # of these, what a pass before the update reads
    kept: bool = False  # dear to make: one optimizer serves all turns
    most_tensors: float = math.inf  # beyond which it is left out
    limit: str = ""  # why
    backend: str = ""  # that danlu's must take; empty for the device's usual one
    than: tuple[str, ...] = ()  # whose times are compared with its own, beside the baseline's


TORCH_ADAMW = [
    Contender("torch-adamw", lambda p: torch.optim.AdamW(p, fused=True), 3, 28),
    Contender("torch-adamw-foreach", lambda p: torch.optim.AdamW(p, foreach=True), 3, 28),
]
TORCH_ADAMW_BF16 = Contender("torch-adamw-bf16", lambda p: torch.optim.AdamW(p, fused=True), 3, 14, BF16)
COMPILED_LIMIT = "left out: torch.compile takes minutes for a step over thousands of tensors"
TORCH_COMPILED = Contender(
    "torch-adamw-compile",
    compiled_adamw,
    3,
    28,
    kept=True,
    most_tensors=500,
    limit=COMPILED_LIMIT,
)
LION = [
    Contender("lion", lambda p: danlu.Lion(p), 2, 20),
    Contender("lion-bf16", lambda p: danlu.Lion(p, state_dtype=BF16), 2, 10, BF16),
]
TIGER = Contender("tiger", lambda p: danlu.Tiger(p), 2, 20)
ADAMW = Contender("adamw", lambda p: danlu.AdamW(p), 3, 28)
ADAMW_BF16 = Contender("adamw-bf16", lambda p: danlu.AdamW(p, state_dtype=BF16), 3, 18, BF16)
ADAM = Contender("adam", lambda p: danlu.Adam(p), 3, 28)
ADAX = Contender("adax", lambda p: danlu.AdaX(p), 3, 28)
ADAXW = Contender("adaxw", lambda p: danlu.AdaXW(p), 3, 28)
ADAFACTOR = Contender(
    "adafactor",
    lambda p: danlu.Adafactor(p, preset="torch"),
    1,
    12,
    than=("torch-adafactor", "torch-adafactor-foreach", "torch-sgd-plain"),
)
LAMB = Contender("lamb", lambda p: danlu.LAMB(p), 3, 44, read_again=16)
AMOS = Contender("amos", lambda p: danlu.Amos(p, lr=1e-3, eta=0.02), 1, 12)

ON_CPU = [
    *TORCH_ADAMW,
    TORCH_ADAMW_BF16,
    Contender("torch-sgd", lambda p: torch.optim.SGD(p, momentum=0.9, fused=True), 2, 20),
    Contender("torch-sgd-plain", lambda p: torch.optim.SGD(p, fused=True), 1, 12),
    Contender("torch-adafactor", lambda p: torch.optim.Adafactor(p, foreach=False), 1, 12),
    Contender("torch-adafactor-foreach", lambda p: torch.optim.Adafactor(p, foreach=True), 1, 12),
    Contender("plain-lion", lambda p: PlainLion(p), 2, 20),
    Contender("plain-lion-foreach", lambda p: PlainLion(p, foreach=True), 2, 20),
    *LION,
    TIGER,
    ADAMW,
    ADAM,
    ADAX,
    ADAXW,
    ADAFACTOR,
    LAMB,
    AMOS,
]

TRITON = [
    Contender("lion-triton", lambda p: danlu.Lion(p, backend="triton"), 2, 20, backend="triton"),
    Contender(
        "lion-bf16-triton",
        lambda p: danlu.Lion(p, state_dtype=BF16, backend="triton"),
        2,
        10,
        BF16,
        backend="triton",
    ),
    Contender("adamw-triton", lambda p: danlu.AdamW(p, backend="triton"), 3, 28, backend="triton"),
    Contender(
        "adamw-bf16-triton",
        lambda p: danlu.AdamW(p, state_dtype=BF16, backend="triton"),
        3,
        18,
        BF16,
        backend="triton",
    ),
]

TORCH_ADAFACTOR = [
    Contender("torch-adafactor-foreach", lambda p: torch.optim.Adafactor(p, foreach=True), 1, 12),
    Contender("torch-adafactor-foreach-bf16", lambda p: torch.optim.Adafactor(p, foreach=True), 1, 6, BF16),
]
TORCH_ADAFACTOR_COMPILED = Contender(
    "torch-adafactor-compile",
    compiled_adafactor,
    1,
    12,
    kept=True,
    most_tensors=500,
    limit=COMPILED_LIMIT,
)


def _by_both(
    name: str, make: Callable[..., torch.optim.Optimizer], touched: tuple[int, int, int], dtype: torch.dtype
) -> list[Contender]:
    """By CUDA's kernels and by Triton's; touched: `written`, `bytes`, `read_again`."""
    written, moved, again = touched
    than = ("torch-adafactor-foreach", "torch-adafactor-compile")
    if dtype == BF16:
        than = ("torch-adafactor-foreach-bf16",)
    options: dict[str, Any] = dict(dtype=dtype, read_again=again, than=than)
    triton = functools.partial(make, backend="triton")
    return [
        Contender(name, make, written, moved, **options),
        Contender(f"{name}-triton", triton, written, moved, backend="triton", **options),
    ]


_ADAFACTOR = functools.partial(danlu.Adafactor, preset="torch")
_AMOS = functools.partial(danlu.Amos, lr=1e-3, eta=0.02)
# passes before the update read g; p and g (Adafactor), p and all states too (LAMB), g (Amos)
REDUCING_ON_CUDA = [
    *_by_both("adafactor", _ADAFACTOR, (1, 24, 12), F32),
    *_by_both("adafactor-bf16", _ADAFACTOR, (1, 12, 6), BF16),
    *_by_both("lamb", danlu.LAMB, (3, 44, 16), F32),
    *_by_both("lamb-bf16", functools.partial(danlu.LAMB, state_dtype=BF16), (3, 28, 10), BF16),
    *_by_both("amos", _AMOS, (1, 16, 4), F32),
    *_by_both("amos-bf16", _AMOS, (1, 8, 2), BF16),
]

ON_CUDA = [
    *TORCH_ADAMW,
    TORCH_COMPILED,
    TORCH_ADAMW_BF16,
    *LION,
    TIGER,
    ADAMW,
    ADAMW_BF16,
    ADAM,
    ADAX,
    Contender("adax-bf16", lambda p: danlu.AdaX(p, state_dtype=BF16), 3, 18, BF16),
    ADAXW,
    *TRITON,
    *TORCH_ADAFACTOR,
    TORCH_ADAFACTOR_COMPILED,
    *REDUCING_ON_CUDA,
]
