"""Adafactor's time by the bytes of gradients that go through all passes together.

Groups that stay in the L2 cache save readings from memory and cost launches; `group_bytes` of
python/danlu/backends/reducing.py decides, here every choice is timed in turns over the same model. Where
the default is 1 GB, it is measured twice, and the difference is what chance makes.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import torch

import cuda_harness
import danlu
from cuda_harness import Step, time_on_gpu, time_on_host
from danlu.backends import cuda as cuda_backend
from danlu.backends.reducing import group_bytes
from harness import Model
from rounds import spread
from workloads import Workload

DTYPES = (torch.float32, torch.bfloat16)
DEFAULT = "default"


def swept(workloads: Sequence[Workload], rounds: int) -> Iterator[dict[str, Any]]:
    """A row for each workload and dtype."""
    return (_on(workload, dtype, rounds) for workload in workloads for dtype in DTYPES)


def sizes() -> dict[str, float]:
    """The default first."""
    cache = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    default = group_bytes(torch.device(cuda_harness.DEVICE))
    return {
        DEFAULT: default,
        "L2/4": cache / 4,
        "L2/2": cache / 2,
        "L2": cache,
        "1 GB": cuda_harness.GIGABYTE,
    }


def _on(workload: Workload, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    model = Model(workload, dtype, cuda_harness.DEVICE)
    model.hold_gradients()
    steps = {name: _step(model, size) for name, size in sizes().items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            seconds[name].append(time_on_gpu(step, time_on_host(step))[0])
    by_default = seconds[DEFAULT]
    times = [
        {
            "size": name,
            "bytes": size,
            "ms": spread(1e3 * s for s in seconds[name]),
            "by_default": spread(a / b for a, b in zip(seconds[name], by_default, strict=True)),
        }
        for name, size in sizes().items()
    ]
    best = min(times, key=lambda one: one["by_default"]["median"])
    kind = str(dtype).removeprefix("torch.")
    return {"workload": workload.id, "dtype": kind, "sizes": times, "best": best["size"]}


def _step(model: Model, size: float) -> Step:
    """Of an optimizer whose plan has groups of this size."""
    optimizer = danlu.Adafactor(model.parameters, preset="torch", backend=cuda_harness.BACKEND)
    with mock.patch.object(cuda_backend, "group_bytes", return_value=size):
        for _ in range(cuda_harness.WARM_UPS):
            optimizer.step()
    return functools.partial(optimizer.step)
