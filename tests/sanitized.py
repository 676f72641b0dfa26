"""Steps of every rule in the emulator built with sanitizers: the first wrong access ends this process.

The tensors end where their memory ends: aligned ones, misaligned ones, with tails.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch

from cases import ALL, BF16, F32, Storage, set_gradient, values
from danlu.backends import BACKENDS
from emulated import emulated
from lazy_runs import LAZY, MODES, run

# element-wise rules see the first six
SHAPES = [(1,), (8,), (1000,), (2049,), (16384,), (16391,), (3, 5), (70, 264), (2, 9, 7), (1, 3000), (300, 8)]


def exact(x: torch.Tensor, shift: int) -> torch.Tensor:
    """A copy whose memory ends with it, `shift` elements after an aligned address."""
    view = torch.empty(x.numel() + shift, dtype=x.dtype)[shift:].view(x.shape)
    view.copy_(x)
    return view


def main() -> None:
    BACKENDS["cuda"] = emulated(sanitize=True)
    done = 0
    for case in ALL:
        for storage in (Storage(F32, F32, F32), Storage(BF16, BF16, BF16)):
            params = []
            for i, shape in enumerate(SHAPES if case.reduces else SHAPES[:6]):
                for shift in (0, 1):
                    p = torch.nn.Parameter(exact(values(shape, i, wild=False).to(storage.param), shift))
                    set_gradient(p, exact(values(shape, 9 + i, wild=False).to(storage.grad), shift))
                    params.append(p)
            groups = [{"params": params[::2]}, {"params": params[1::2], "lr": 1e-4}]
            opt = case.make(groups, backend="cuda", state_dtype=storage.moment, max_grad_norm=1.0)
            for _ in range(2):
                opt.step()
            assert {row.backend for row in opt.backend_report()} == {"cuda"}
            done += 1
    for mode in MODES:
        for storage in (Storage(F32, F32, F32), Storage(BF16, BF16, BF16)):
            run(LAZY[0], storage, "cuda", mode, shapes=[(12, 5), (7,), (3, 16_391), (0, 4), (4, 0), (300, 8)])
            done += 1
    print(done)


if __name__ == "__main__":
    main()
