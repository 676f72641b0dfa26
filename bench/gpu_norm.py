"""The norm of all gradients on a GPU: danlu's kernels and torch's function against reading the same bytes.

The ceiling is a kernel that loads as many bytes, four packs of 16 bytes a thread, and does nothing else: a
sum by torch would be slower than the memory, and so flatter.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

import bars
import cuda_harness
from cuda_harness import Step, time_on_gpu, time_on_host
from grad_norm import native_norm
from harness import Model
from rounds import spread
from workloads import Workload

DTYPES = (torch.float32, torch.bfloat16)


def measured(workloads: Sequence[Workload], rounds: int) -> Iterator[dict[str, Any]]:
    """A row for each workload, dtype and way."""
    for workload in workloads:
        for dtype in DTYPES:
            yield from _of_gradients(workload, dtype, rounds)


def ways_to_norm(model: Model) -> dict[str, Callable[[], object]]:
    return {
        "cuda": native_norm(model, cuda_harness.BACKEND),
        "triton": native_norm(model, "triton"),
        "torch get_total_norm": functools.partial(torch.nn.utils.get_total_norm, model.gradients),
    }


def reading(model: Model) -> Step:
    """One array of as many bytes as the gradients have."""
    from danlu import _cuda

    array = torch.ones(sum(g.nbytes for g in model.gradients) // 4, device=cuda_harness.DEVICE)

    def read() -> None:
        stream = torch.cuda.current_stream().cuda_stream
        _cuda.read_through(array.data_ptr(), len(array), torch.cuda.current_device(), stream)

    return read


def _of_gradients(workload: Workload, dtype: torch.dtype, rounds: int) -> list[dict[str, Any]]:
    model = Model(workload, dtype, cuda_harness.DEVICE)
    model.hold_gradients()
    ways, read = ways_to_norm(model), reading(model)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for step in (read, *ways.values()):
        step()
    for _ in range(rounds):
        for name, way in ways.items():
            seconds[name].append((time_on_gpu(way, time_on_host(way))[0], time_on_gpu(read, 1e-4)[0]))
    return [_row(workload, dtype, name, pairs) for name, pairs in seconds.items()]


def _row(
    workload: Workload, dtype: torch.dtype, name: str, pairs: list[tuple[float, float]]
) -> dict[str, Any]:
    share = spread(read / norm for norm, read in pairs)
    kind = str(dtype).removeprefix("torch.")
    row = {
        "workload": workload.id,
        "dtype": kind,
        "name": name,
        "ms": spread(1e3 * norm for norm, _ in pairs),
        "reading_GB_per_s": spread(1e-9 * workload.elements * dtype.itemsize / read for _, read in pairs),
        "share_of_reading": share,
    }
    asked = {} if name.startswith("torch") else {"bar": bars.bar("of reading", share, least=bars.NORM_SHARE)}
    return {**row, **asked}
