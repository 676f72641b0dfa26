"""The norm over all gradients by Triton kernels, interpreted."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import danlu
from danlu.triton_kernels import norm
from norm_on_a_gpu import *  # noqa: F403 the tests that both GPU backends pass


@pytest.mark.parametrize("count", [3, 4])
def test_tables_start_at_multiples_of_16_bytes(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton compiles a kernel once more for addresses that do not."""
    params = [torch.nn.Parameter(torch.ones(5)) for _ in range(count)]
    for p in params:
        p.grad = torch.ones(5)
    opt = danlu.Lion(params, max_grad_norm=1.0, backend="triton")
    squares, seen = norm.squares, []

    class Watched:
        def __getitem__(self, grid: tuple[int]) -> Any:
            def launch(addresses: torch.Tensor, sizes: torch.Tensor, *others: Any, **constants: Any) -> None:
                seen.append([addresses.data_ptr() % 16, sizes.data_ptr() % 16, sizes[:count].tolist()])
                squares[grid](addresses, sizes, *others, **constants)

            return launch

    monkeypatch.setattr(norm, "squares", Watched())
    opt.step()
    assert seen == [[0, 0, [5] * count]]
