"""Steps of some optimizers over odd shapes and misaligned views, for compute-sanitizer to watch.

The caching allocator must be off (PYTORCH_NO_CUDA_MEMORY_CACHING=1), so that tensors end where memory ends.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

import danlu
from danlu.wrappers.lazy import MODES

SHAPES = [
    *[(size,) for size in (1, 7, 1000, 2049, 16384, 16391, 40003)],
    *[(1, 7), (33, 65), (300, 40), (1030, 9), (3, 50, 71)],
]


def lazy(mode: str) -> Callable[..., torch.optim.Optimizer]:
    return lambda params, **options: danlu.Lazy(danlu.AdamW(params, **options), mode)


OPTIMIZERS: dict[str, tuple[Callable[..., torch.optim.Optimizer], dict[str, Any]]] = {
    "Lion": (danlu.Lion, {}),
    "AdamW": (danlu.AdamW, {}),
    "Adafactor": (danlu.Adafactor, dict(preset="torch")),
    "LAMB": (danlu.LAMB, {}),
    "Amos": (danlu.Amos, dict(lr=1e-3, eta=0.02)),
    **{f"Lazy, {mode}": (lazy(mode), {}) for mode in MODES},
}


def views(shift: int, dtype: torch.dtype, device: str) -> list[torch.Tensor]:
    """Copies of other views would start at an aligned address again."""
    return [torch.ones(math.prod(s) + shift).to(device, dtype)[shift:].view(s) for s in SHAPES]


def main(device: str = "cuda") -> None:
    for name, (make, options) in OPTIMIZERS.items():
        for dtype in (torch.float32, torch.bfloat16):
            params = []
            for shift in (0, 1):
                for start, gradient in zip(*(views(shift, dtype, device) for _ in range(2)), strict=True):
                    p = torch.nn.Parameter(start)
                    gradient[1::3] = 0  # rows that take no part where an optimizer is lazy
                    p.grad = gradient
                    params.append(p)
            optimizer = make(params, state_dtype=dtype, max_grad_norm=1.0, **options)
            for _ in range(2):
                optimizer.step()
            if device == "cuda":
                torch.cuda.synchronize()
            backends = {row.backend for row in optimizer.backend_report()}
            print(name, dtype, backends, params[-1].detach().double().sum().item())


if __name__ == "__main__":
    main()
