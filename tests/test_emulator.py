"""The emulator does what a GPU does: barriers, shuffles, shared memory, and errors where a GPU has them."""

from __future__ import annotations

import pytest
import torch

from emulated import Emulated


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
