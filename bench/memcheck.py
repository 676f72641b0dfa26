"""Steps of two optimizers over odd sizes and misaligned views, for compute-sanitizer to watch.

The caching allocator must be off (PYTORCH_NO_CUDA_MEMORY_CACHING=1), so that tensors end where memory ends.
"""

from __future__ import annotations

import torch

import danlu

SIZES = (1, 7, 1000, 2049, 16384, 16391, 40003)


def views(shift: int, dtype: torch.dtype, device: str) -> list[torch.Tensor]:
    """Copies of other views would start at an aligned address again."""
    return [torch.ones(size + shift).to(device, dtype)[shift:] for size in SIZES]


def main(device: str = "cuda") -> None:
    for make in (danlu.Lion, danlu.AdamW):
        for dtype in (torch.float32, torch.bfloat16):
            params = []
            for shift in (0, 1):
                for start, gradient in zip(*(views(shift, dtype, device) for _ in range(2)), strict=True):
                    p = torch.nn.Parameter(start)
                    p.grad = gradient
                    params.append(p)
            optimizer = make(params, state_dtype=dtype)
            for _ in range(2):
                optimizer.step()
            if device == "cuda":
                torch.cuda.synchronize()
            backends = {row.backend for row in optimizer.backend_report()}
            print(make.__name__, dtype, backends, params[-1].detach().double().sum().item())


if __name__ == "__main__":
    main()
