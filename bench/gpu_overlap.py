"""What it saves on a GPU that the passes of a rule that reduces overlap (programmatic dependent launch)."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch

import cuda_harness
import danlu
from cuda_harness import time_on_gpu, time_on_host
from danlu.backends import BACKENDS
from harness import Model
from rounds import spread
from workloads import Workload

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adafactor": functools.partial(danlu.Adafactor, preset="torch"),
    "lamb": danlu.LAMB,
}
DTYPES = (torch.float32, torch.bfloat16)


def turn_off() -> None:
    """Also for processes that begin later."""
    os.environ["DANLU_OVERLAP"] = "0"
    _set(False)


def saved(workloads: Sequence[Workload], rounds: int) -> list[dict[str, Any]]:
    """Milliseconds of a step with and without, in turns, and the ratio; nothing where it is turned off."""
    if os.environ.get("DANLU_OVERLAP") == "0":
        return []
    try:
        return [
            _on(workload, dtype, name, rounds)
            for workload in workloads
            for dtype in DTYPES
            for name in OPTIMIZERS
        ]
    finally:
        _set(True)


def _on(workload: Workload, dtype: torch.dtype, name: str, rounds: int) -> dict[str, Any]:
    model = Model(workload, dtype, cuda_harness.DEVICE)
    model.hold_gradients()
    optimizer = OPTIMIZERS[name](model.parameters, backend=cuda_harness.BACKEND)
    for _ in range(cuda_harness.WARM_UPS):
        optimizer.step()
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(rounds):
        for overlaps, taken in seconds.items():
            _set(overlaps)
            taken.append(time_on_gpu(optimizer.step, time_on_host(optimizer.step))[0])
    row: dict[str, Any] = {"workload": workload.id, "optimizer": name, "dtype": str(dtype).partition(".")[2]}
    row["ms"], row["without_ms"] = (spread(1e3 * s for s in seconds[overlaps]) for overlaps in (True, False))
    row["saves"] = spread(a / b for a, b in zip(seconds[False], seconds[True], strict=True))
    return row


def _set(overlaps: bool) -> None:
    cuda: Any = BACKENDS["cuda"]
    cuda.dependent_launches = overlaps
