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
    label: str = ""  # as users write it
    way: str = ""  # of several to run the same optimizer; danlu's are its backends

    @property
    def title(self) -> str:
        """What plots call it."""
        added = ", ".join(filter(None, [self.way or self.backend, "bf16" if self.dtype == BF16 else ""]))
        return f"{self.label} ({added})" if added else self.label


_TORCH_ADAMW, _TORCH_ADAFACTOR = "torch.optim.AdamW", "torch.optim.Adafactor"
TORCH_ADAMW = [
    Contender(
        "torch-adamw",
        lambda p: torch.optim.AdamW(p, fused=True),
        3,
        28,
        label=_TORCH_ADAMW,
        way="fused",
    ),
    Contender(
        "torch-adamw-foreach",
        lambda p: torch.optim.AdamW(p, foreach=True),
        3,
        28,
        label=_TORCH_ADAMW,
        way="foreach",
    ),
]
TORCH_ADAMW_BF16 = dataclasses.replace(TORCH_ADAMW[0], id="torch-adamw-bf16", bytes=14, dtype=BF16)
COMPILED_LIMIT = "left out: torch.compile takes minutes for a step over thousands of tensors"
TORCH_COMPILED = Contender(
    "torch-adamw-compile",
    compiled_adamw,
    3,
    28,
    kept=True,
    most_tensors=500,
    limit=COMPILED_LIMIT,
    label=_TORCH_ADAMW,
    way="compiled",
)
LION = [
    Contender("lion", lambda p: danlu.Lion(p), 2, 20, label="danlu.Lion"),
    Contender("lion-bf16", lambda p: danlu.Lion(p, state_dtype=BF16), 2, 10, BF16, label="danlu.Lion"),
]
TIGER = Contender("tiger", lambda p: danlu.Tiger(p), 2, 20, label="danlu.Tiger")
ADAMW = Contender("adamw", lambda p: danlu.AdamW(p), 3, 28, label="danlu.AdamW")
ADAMW_BF16 = Contender(
    "adamw-bf16", lambda p: danlu.AdamW(p, state_dtype=BF16), 3, 18, BF16, label="danlu.AdamW"
)
ADAM = Contender("adam", lambda p: danlu.Adam(p), 3, 28, label="danlu.Adam")
ADAX = Contender("adax", lambda p: danlu.AdaX(p), 3, 28, label="danlu.AdaX")
ADAXW = Contender("adaxw", lambda p: danlu.AdaXW(p), 3, 28, label="danlu.AdaXW")
ADAFACTOR = Contender(
    "adafactor",
    lambda p: danlu.Adafactor(p, preset="torch"),
    1,
    12,
    than=("torch-adafactor", "torch-adafactor-foreach", "torch-sgd-plain"),
    label="danlu.Adafactor",
)
LAMB = Contender("lamb", lambda p: danlu.LAMB(p), 3, 44, read_again=16, label="danlu.LAMB")
AMOS = Contender("amos", lambda p: danlu.Amos(p, lr=1e-3, eta=0.02), 1, 12, label="danlu.Amos")

TORCH_ADAFACTOR = [
    Contender(
        "torch-adafactor-foreach",
        lambda p: torch.optim.Adafactor(p, foreach=True),
        1,
        12,
        label=_TORCH_ADAFACTOR,
        way="foreach",
    )
]
TORCH_ADAFACTOR += [
    dataclasses.replace(TORCH_ADAFACTOR[0], id="torch-adafactor-foreach-bf16", bytes=6, dtype=BF16)
]
_PLAIN_LION = "Lion in plain torch"

ON_CPU = [
    *TORCH_ADAMW,
    TORCH_ADAMW_BF16,
    Contender(
        "torch-sgd",
        lambda p: torch.optim.SGD(p, momentum=0.9, fused=True),
        2,
        20,
        label="torch.optim.SGD, momentum",
        way="fused",
    ),
    Contender(
        "torch-sgd-plain",
        lambda p: torch.optim.SGD(p, fused=True),
        1,
        12,
        label="torch.optim.SGD",
        way="fused",
    ),
    Contender(
        "torch-adafactor",
        lambda p: torch.optim.Adafactor(p, foreach=False),
        1,
        12,
        label=_TORCH_ADAFACTOR,
        way="loop",
    ),
    TORCH_ADAFACTOR[0],
    Contender("plain-lion", lambda p: PlainLion(p), 2, 20, label=_PLAIN_LION, way="loop"),
    Contender(
        "plain-lion-foreach",
        lambda p: PlainLion(p, foreach=True),
        2,
        20,
        label=_PLAIN_LION,
        way="foreach",
    ),
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
    dataclasses.replace(
        c, id=f"{c.id}-triton", make=functools.partial(make, backend="triton"), backend="triton"
    )
    for c, make in (
        (LION[0], danlu.Lion),
        (LION[1], functools.partial(danlu.Lion, state_dtype=BF16)),
        (ADAMW, danlu.AdamW),
        (ADAMW_BF16, functools.partial(danlu.AdamW, state_dtype=BF16)),
    )
]

TORCH_ADAFACTOR_COMPILED = Contender(
    "torch-adafactor-compile",
    compiled_adafactor,
    1,
    12,
    kept=True,
    most_tensors=500,
    limit=COMPILED_LIMIT,
    label=_TORCH_ADAFACTOR,
    way="compiled",
)


def _by_both(
    name: str, make: Callable[..., torch.optim.Optimizer], touched: tuple[int, int, int], dtype: torch.dtype
) -> list[Contender]:
    """By CUDA's kernels and by Triton's; touched: `written`, `bytes`, `read_again`."""
    written, moved, again = touched
    than = ("torch-adafactor-foreach", "torch-adafactor-compile")
    if dtype == BF16:
        than = ("torch-adafactor-foreach-bf16",)
    label = {c.id: c.label for c in (ADAFACTOR, LAMB, AMOS)}[name.removesuffix("-bf16")]
    options: dict[str, Any] = dict(dtype=dtype, read_again=again, than=than, label=label)
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
    Contender("adax-bf16", lambda p: danlu.AdaX(p, state_dtype=BF16), 3, 18, BF16, label="danlu.AdaX"),
    ADAXW,
    *TRITON,
    *TORCH_ADAFACTOR,
    TORCH_ADAFACTOR_COMPILED,
    *REDUCING_ON_CUDA,
]
