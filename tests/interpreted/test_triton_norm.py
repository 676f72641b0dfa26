"""The norm over all gradients by Triton kernels, interpreted."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import danlu
from cases import BF16, F16, F32, values
from danlu.backends.triton import TritonExecutor
from danlu.triton_kernels import norm
from layouts import LAYOUTS
from test_cuda_norm import squares_of, with_gradients

CHUNK = 16384


def executor_of(opt: danlu.FusedOptimizer) -> TritonExecutor:
    assert opt._plan is not None
    executor = opt._plan._executors[0]
    assert isinstance(executor, TritonExecutor)
    return executor


def measured(gradients: list[torch.Tensor | None], max_norm: float = 1.0) -> tuple[float, float]:
    """The squares and the factor."""
    opt = danlu.Lion(with_gradients(gradients), backend="triton", max_grad_norm=max_norm)
    opt.step()
    result = executor_of(opt)._norm
    return result[0].item(), result.view(F32)[2].item()


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("shift", [0, 1])
def test_every_element_counts_once(shift: int, dtype: torch.dtype) -> None:
    for size in (1, 4095, CHUNK, 2 * CHUNK + 4103):
        g = torch.full((size + shift,), 3.0, dtype=dtype)[shift:]
        assert measured([g])[0] == 9.0 * size


@pytest.mark.parametrize("max_norm", [0.3, 1e6])
def test_over_all_gradients(max_norm: float) -> None:
    """Of several dtypes and layouts, empty ones and missing ones among them."""
    gradients: list[torch.Tensor | None] = [
        layout.grad(values(layout.shape, i, wild=False)) for i, layout in enumerate(LAYOUTS) if layout.native
    ]
    gradients += [None, values((300, 70), 1, wild=False).to(BF16), None, values((5,), 2, wild=False).to(F16)]
    squares, factor = measured(gradients, max_norm)
    assert squares == pytest.approx(squares_of(gradients), rel=1e-14)
    assert factor == pytest.approx(1 / max(1.0, math.sqrt(squares) / max_norm), rel=1e-7)


def test_numbers_whose_squares_fp32_does_not_hold() -> None:
    assert measured([torch.tensor([3e30, 4e30])], 5e28) == pytest.approx((25e60, 0.01), rel=1e-6)
    assert measured([torch.tensor([3e-30, 4e-30])])[0] == pytest.approx(25e-60, rel=1e-6)
    assert measured([torch.tensor([math.inf, 1.0])]) == (math.inf, 0.0)
    assert all(map(math.isnan, measured([torch.tensor([math.nan, 1.0])])))
    assert measured([torch.zeros(5)]) == (0.0, 1.0)


@pytest.mark.full
def test_many_sums() -> None:
    """More than the last program adds at once."""
    assert measured([torch.ones(3) for _ in range(4099)])[0] == 3 * 4099


def test_a_gradient_that_goes_away_no_longer_counts() -> None:
    params = with_gradients([torch.full((CHUNK + 5,), 2.0), torch.ones(9)])
    opt = danlu.Lion(params, backend="triton", max_grad_norm=1.0)
    opt.step()
    params[0].grad = None
    opt.step()
    assert executor_of(opt)._norm[0] == 9.0


def test_with_parameters_elsewhere_and_a_scale() -> None:
    """A parameter that no kernel takes counts, too; the norm is that of the unscaled gradients."""
    strided = torch.nn.Parameter(torch.zeros(6, 8)[:, ::2])
    strided.grad = torch.full((6, 4), 2.0)
    (plain,) = with_gradients([torch.ones(5)])
    opt = danlu.Lion([plain, strided], backend="triton", max_grad_norm=1.0)
    opt.step()
    assert {row.backend for row in opt.backend_report()} == {"triton", "reference"}
    clip = executor_of(opt)._clip
    assert clip is not None
    assert clip.item() == pytest.approx(1 / math.sqrt(5 + 96), rel=1e-7)

    (p,) = with_gradients([torch.full((4,), 1024.0)])
    for max_norm, factor in ((0.5, 0.25), (5.0, 1.0)):
        opt = danlu.AdamW([p], backend="triton", max_grad_norm=max_norm, capturable=True)
        opt.grad_scale = torch.tensor([1024.0])  # type: ignore[attr-defined]
        opt.found_inf = torch.tensor([0.0])  # type: ignore[attr-defined]
        opt.step()
        assert executor_of(opt)._clip == factor / 1024


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
