"""The norm over all gradients by CUDA kernels, in the emulator: exact, in few launches that read once."""

from __future__ import annotations

import pytest
import torch

import danlu
from cases import BF16, F32
from emulated import STREAM, Emulated
from norm_on_a_gpu import *  # noqa: F403 the tests that both GPU backends pass
from norm_on_a_gpu import CHUNK, measured, with_gradients
from training import all_same, copies, everything


def test_sums_of_many_chunks(gpu: str) -> None:
    """More than the last block has threads."""
    assert measured(gpu, [torch.ones(CHUNK * 1100 + 1)])[0] == CHUNK * 1100 + 1


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
