"""The emulator does what a GPU does: barriers, shuffles, shared memory, and errors where a GPU has them."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest
import torch

import danlu
from emulated import STREAM, Emulated
from machine_code import code


@pytest.mark.parametrize("threads", [32, 64, 256, 1024])
@pytest.mark.parametrize("count", [1, 31, 256, 3001])
def test_sums_over_a_block(threads: int, count: int, cuda: Emulated) -> None:
    values = [float(i % 97) for i in range(count)]
    sums = cuda.native.block_sums(values, threads)
    for at, value in enumerate(sums):
        first = at // threads * threads
        assert value == sum(values[first : first + threads])


def test_threads_in_two_dimensions(cuda: Emulated) -> None:
    for size in (1, 8, 32):
        matrix = torch.randn(size, size)
        turned = torch.tensor(cuda.native.transposed(matrix.flatten().tolist(), size)).reshape(size, size)
        assert torch.equal(turned, matrix.T)


def test_a_barrier_that_not_all_threads_reach(cuda: Emulated) -> None:
    with pytest.raises(RuntimeError, match="a barrier that not all threads reach"):
        cuda.native.torn_barrier()
    assert cuda.native.block_sums([1.0, 2.0], 32)[0] == 3.0  # goes on afterwards


def test_lanes_of_a_warp_in_different_shuffles(cuda: Emulated) -> None:
    """On a GPU they would wait for one another, or exchange nothing."""
    with pytest.raises(RuntimeError, match="lanes of a warp in different shuffles"):
        cuda.native.torn_shuffle()


def test_a_misaligned_access(cuda: Emulated) -> None:
    with pytest.raises(RuntimeError, match="misaligned address"):
        cuda.native.misaligned()


def test_launches_go_to_an_executor(cuda: Emulated, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which kernel, its grid, and its parameters as a GPU has them; an error of it is that of the step."""
    assert cuda.native is not None
    names = code.symbols(Path(cuda.native.__file__ or ""))
    calls: list[Any] = []
    monkeypatch.setattr(cuda.native.machine(), "executor", calls.append)
    params = [torch.nn.Parameter(torch.ones(16384 + size)) for size in (1, 2)]
    for p in params:
        p.grad = torch.ones_like(p)
    opt = danlu.Lion(params, lr=0.25, backend="cuda", max_grad_norm=1.0)
    opt.step()
    squares, norm, step = calls
    assert "squares_kernel<float, danlu::LaunchList<4096>" in names[squares.place]
    assert names[norm.place].endswith("::norm_kernel")
    assert (
        "apply_kernel<danlu::cuda::Lion, danlu::Formats<danlu::F32, danlu::F32, danlu::F32>"
        in names[step.place]
    )
    assert [(call.grid, call.block) for call in calls] == [
        ([4, 1, 1], [256, 1, 1]), ([1, 1, 1], [1024, 1, 1]), ([4, 1, 1], [256, 1, 1])
    ]  # fmt: skip
    assert {call.stream for call in calls} == {STREAM}
    # const double* sums, int64_t count, double max_norm, const float* grad_scale, Norm* norm
    _, count, max_norm, grad_scale, _ = struct.unpack("<QqdQQ", norm.parameters)
    assert (count, max_norm, grad_scale) == (4, 1.0, 0)
    # LaunchList: two addresses that are null, that of the factor, how many tensors, and words for each
    device_coefficients, found_inf, clip, tensors = struct.unpack_from("<QQQi", step.parameters)
    assert (device_coefficients, found_inf, tensors) == (0, 0, 2)
    assert clip
    assert struct.unpack_from("<QQ", step.parameters, 32) == (params[0].data_ptr(), params[0].grad.data_ptr())
    assert len(squares.parameters) == len(step.parameters) <= 4096
    assert (params[0] == 1).all()  # nothing has run

    def failing(call: Any) -> None:
        raise ValueError("no such code")

    cuda.native.machine().executor = failing
    with pytest.raises(ValueError, match="no such code"):
        opt.step()
    cuda.native.machine().executor = None
    opt.step()
    assert (params[0] < 1).all()
