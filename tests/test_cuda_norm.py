"""The norm over all gradients by CUDA kernels, in the emulator: exact, in few launches that read once."""

from __future__ import annotations

import math

import pytest
import torch

import danlu
from cases import BF16, F16, F32, values
from danlu.backends.cuda import CudaExecutor
from emulated import STREAM, Emulated
from layouts import LAYOUTS
from training import all_same, copies, everything

pytestmark = pytest.mark.usefixtures("cuda")
CHUNK = 16384


def with_gradients(gradients: list[torch.Tensor | None]) -> list[torch.nn.Parameter]:
    params = [torch.nn.Parameter(torch.zeros(12) if g is None else torch.zeros_like(g)) for g in gradients]
    for p, g in zip(params, gradients, strict=True):
        p.grad = g
    return params


def executor_of(opt: danlu.FusedOptimizer) -> CudaExecutor:
    assert opt._plan is not None
    executor = opt._plan._executors[0]
    assert isinstance(executor, CudaExecutor)
    return executor


def measured(gradients: list[torch.Tensor | None], max_norm: float = 1.0) -> tuple[float, float]:
    """The squares and the factor."""
    opt = danlu.Lion(with_gradients(gradients), backend="cuda", max_grad_norm=max_norm)
    opt.step()
    result = executor_of(opt)._norm
    return result[0].item(), result.view(F32)[2].item()


def squares_of(gradients: list[torch.Tensor | None]) -> float:
    return math.fsum(g.double().square().sum().item() for g in gradients if g is not None)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("size", [1, 7, 255, 2048, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 4103])
def test_every_element_counts_once(size: int, shift: int, dtype: torch.dtype) -> None:
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


def test_many_sums() -> None:
    """More than the last block has threads, and than a launch has gradients."""
    assert measured([torch.ones(3) for _ in range(4099)])[0] == 3 * 4099
    assert measured([torch.ones(CHUNK * 1100 + 1)])[0] == CHUNK * 1100 + 1


def test_a_gradient_that_goes_away_no_longer_counts() -> None:
    params = with_gradients([torch.full((CHUNK + 5,), 2.0), torch.ones(9)])
    opt = danlu.Lion(params, backend="cuda", max_grad_norm=1.0)
    opt.step()
    params[0].grad = None
    opt.step()
    assert executor_of(opt)._norm[0] == 9.0


def test_launches(cuda: Emulated) -> None:
    """One for as many gradients as a list holds, and one for the factor."""

    def launched(count: int, **options: float) -> list[tuple[int, int]]:
        opt = danlu.LAMB(with_gradients([torch.ones(3) for _ in range(count)]), backend="cuda", **options)
        for _ in range(2):
            cuda.native.reset()
            cuda.native.machine().end_block = 1  # what they compute is not looked at
            opt.step()
        assert {one.stream for one in cuda.native.machine().launches} == {STREAM}
        return [(one.blocks, one.threads) for one in cuda.native.machine().launches]

    for count in (1, 1321):
        plain = launched(count)
        assert launched(count, max_grad_norm=1.0) == [(count, 256), (1, 1024), *plain]
    assert launched(1400, max_grad_norm=1.0)[:3] == [(1321, 256), (79, 256), (1, 1024)]


def test_each_gradient_is_read_once(cuda: Emulated) -> None:
    for dtype in (F32, BF16):
        opts = [
            danlu.Lion(with_gradients([torch.ones(600_000, dtype=dtype)]), backend="cuda", max_grad_norm=norm)
            for norm in (1.0, None)
        ]
        read = []
        for opt in opts:
            opt.step()
            cuda.native.reset()
            cuda.native.machine().count_traffic()
            opt.step()
            read.append(cuda.native.machine().bytes_read)
        assert 0 <= read[0] - read[1] - 600_000 * dtype.itemsize < 1000


def test_with_parameters_elsewhere() -> None:
    """A parameter that no kernel takes counts, too."""
    strided = torch.nn.Parameter(torch.zeros(6, 8)[:, ::2])
    strided.grad = torch.full((6, 4), 2.0)
    (plain,) = with_gradients([torch.ones(5)])
    opt = danlu.Lion([plain, strided], backend="cuda", max_grad_norm=1.0)
    opt.step()
    assert {row.backend for row in opt.backend_report()} == {"cuda", "reference"}
    executor = executor_of(opt)
    assert executor._clip is not None
    assert executor._clip.item() == pytest.approx(1 / math.sqrt(5 + 96), rel=1e-7)


def test_a_scale_on_the_device() -> None:
    (p,) = with_gradients([torch.full((4,), 1024.0)])
    for max_norm, factor in ((0.5, 0.25), (5.0, 1.0)):
        opt = danlu.AdamW([p], backend="cuda", max_grad_norm=max_norm, capturable=True)
        opt.grad_scale = torch.tensor([1024.0])  # type: ignore[attr-defined]
        opt.found_inf = torch.tensor([0.0])  # type: ignore[attr-defined]
        opt.step()
        assert executor_of(opt)._clip == factor / 1024


def test_a_launch_that_fails_changes_nothing(cuda: Emulated) -> None:
    params = with_gradients([torch.ones(5), torch.ones(4)])
    opt = danlu.AdamW([("first", params[0]), ("second", params[1])], backend="cuda", max_grad_norm=1.0)
    opt.step()
    before = copies(opt)
    for failing in (0, 1):
        cuda.native.machine().fail_launch = failing
        with pytest.raises(RuntimeError, match=r"^first: the CUDA kernel could not be launched") as failure:
            opt.step()
        assert "earlier launches" not in str(failure.value)
        assert all_same(everything(opt), before)
