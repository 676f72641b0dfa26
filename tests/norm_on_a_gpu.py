"""The norm over all gradients by the GPU backend of this process: CUDA's emulated or Triton's interpreted."""

from __future__ import annotations

import math

import pytest
import torch

import danlu
from cases import BF16, F16, F32, INTERPRETED, values
from danlu.backends.gpu import GpuExecutor
from layouts import LAYOUTS

CHUNK = 16384
SIZES = [1, 4095, CHUNK, 2 * CHUNK + 4103]
if not INTERPRETED:
    SIZES = [1, 7, 255, 2048, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 4103]


def with_gradients(gradients: list[torch.Tensor | None]) -> list[torch.nn.Parameter]:
    params = [torch.nn.Parameter(torch.zeros(12) if g is None else torch.zeros_like(g)) for g in gradients]
    for p, g in zip(params, gradients, strict=True):
        p.grad = g
    return params


def executor_of(opt: danlu.FusedOptimizer) -> GpuExecutor:
    assert opt._plan is not None
    executor = opt._plan._executors[0]
    assert isinstance(executor, GpuExecutor)
    return executor


def measured(gpu: str, gradients: list[torch.Tensor | None], max_norm: float = 1.0) -> tuple[float, float]:
    """The squares and the factor."""
    opt = danlu.Lion(with_gradients(gradients), backend=gpu, max_grad_norm=max_norm)
    opt.step()
    result = executor_of(opt)._norm
    return result[0].item(), result.view(F32)[2].item()


def squares_of(gradients: list[torch.Tensor | None]) -> float:
    return math.fsum(g.double().square().sum().item() for g in gradients if g is not None)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("size", SIZES)
def test_every_element_counts_once(gpu: str, size: int, shift: int, dtype: torch.dtype) -> None:
    g = torch.full((size + shift,), 3.0, dtype=dtype)[shift:]
    assert measured(gpu, [g])[0] == 9.0 * size


@pytest.mark.parametrize("max_norm", [0.3, 1e6])
def test_over_all_gradients(gpu: str, max_norm: float) -> None:
    """Of several dtypes and layouts, empty ones and missing ones among them."""
    gradients: list[torch.Tensor | None] = [
        layout.grad(values(layout.shape, i, wild=False)) for i, layout in enumerate(LAYOUTS) if layout.native
    ]
    gradients += [None, values((300, 70), 1, wild=False).to(BF16), None, values((5,), 2, wild=False).to(F16)]
    squares, factor = measured(gpu, gradients, max_norm)
    assert squares == pytest.approx(squares_of(gradients), rel=1e-14)
    assert factor == pytest.approx(1 / max(1.0, math.sqrt(squares) / max_norm), rel=1e-7)


def test_numbers_whose_squares_fp32_does_not_hold(gpu: str) -> None:
    assert measured(gpu, [torch.tensor([3e30, 4e30])], 5e28) == pytest.approx((25e60, 0.01), rel=1e-6)
    assert measured(gpu, [torch.tensor([3e-30, 4e-30])])[0] == pytest.approx(25e-60, rel=1e-6)
    assert measured(gpu, [torch.tensor([math.inf, 1.0])]) == (math.inf, 0.0)
    assert all(map(math.isnan, measured(gpu, [torch.tensor([math.nan, 1.0])])))
    assert measured(gpu, [torch.zeros(5)]) == (0.0, 1.0)


@(pytest.mark.full if INTERPRETED else pytest.mark.usefixtures("gpu"))
def test_many_sums(gpu: str) -> None:
    """More than the last block adds at once, and than a launch of CUDA's has gradients."""
    assert measured(gpu, [torch.ones(3) for _ in range(4099)])[0] == 3 * 4099


def test_a_gradient_that_goes_away_no_longer_counts(gpu: str) -> None:
    params = with_gradients([torch.full((CHUNK + 5,), 2.0), torch.ones(9)])
    opt = danlu.Lion(params, backend=gpu, max_grad_norm=1.0)
    opt.step()
    params[0].grad = None
    opt.step()
    assert executor_of(opt)._norm[0] == 9.0


def test_with_parameters_elsewhere(gpu: str) -> None:
    """A parameter that no kernel takes counts, too."""
    strided = torch.nn.Parameter(torch.zeros(6, 8)[:, ::2])
    strided.grad = torch.full((6, 4), 2.0)
    (plain,) = with_gradients([torch.ones(5)])
    opt = danlu.Lion([plain, strided], backend=gpu, max_grad_norm=1.0)
    opt.step()
    assert {row.backend for row in opt.backend_report()} == {gpu, "reference"}
    clip = executor_of(opt)._clip
    assert clip is not None
    assert clip.item() == pytest.approx(1 / math.sqrt(5 + 96), rel=1e-7)


def test_a_scale_on_the_device(gpu: str) -> None:
    """The norm is that of the unscaled gradients."""
    (p,) = with_gradients([torch.full((4,), 1024.0)])
    for max_norm, factor in ((0.5, 0.25), (5.0, 1.0)):
        opt = danlu.AdamW([p], backend=gpu, max_grad_norm=max_norm, capturable=True)
        opt.grad_scale = torch.tensor([1024.0])  # type: ignore[attr-defined]
        opt.found_inf = torch.tensor([0.0])  # type: ignore[attr-defined]
        opt.step()
        assert executor_of(opt)._clip == factor / 1024
