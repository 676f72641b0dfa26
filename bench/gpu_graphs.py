"""A captured step's replay beside eager steps, with coefficients from the host and from the device."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

import cuda_harness
import danlu
from cuda_harness import busy, kernels, time_on_gpu, time_on_host
from harness import Model
from rounds import spread
from workloads import Workload

Make = Callable[..., torch.optim.Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "adamw": danlu.AdamW,
    "adafactor": functools.partial(danlu.Adafactor, preset="torch"),
    "lamb": danlu.LAMB,
}


def times(workloads: Sequence[Workload], rounds: int) -> list[dict[str, Any]]:
    """A row for each optimizer and workload: of the GPU, and of the host until the call returns."""
    result = []
    for name, make, workload, model in _all(workloads):
        capturable, graph = captured(make, model)
        steps = {"eager": make(model.parameters).step, "capturable": capturable.step, "replay": graph.replay}
        taken: dict[str, list[tuple[float, float]]] = {way: [] for way in steps}
        for _ in range(rounds):
            for way, step in steps.items():
                step()
                host = time_on_host(step)
                taken[way].append((host, time_on_gpu(step, host)[0]))
        row: dict[str, Any] = {"optimizer": name, "workload": workload.id}
        for way, pairs in taken.items():
            row[f"{way}_host_ms"] = spread(1e3 * host for host, _ in pairs)
            row[f"{way}_ms"] = spread(1e3 * seconds for _, seconds in pairs)
        result.append(row)
    return result


def kernel_counts(workloads: Sequence[Workload]) -> list[dict[str, Any]]:
    """Kernels of a replay and of a step with coefficients from the device, by the profiler."""
    result = []
    for name, make, workload, model in _all(workloads):
        optimizer, graph = captured(make, model)
        row: dict[str, Any] = {"optimizer": name, "workload": workload.id}
        for way, step in (("replay", graph.replay), ("capturable", optimizer.step)):
            seen = kernels(step)
            row[way] = {"kernels": len(seen), "kernel_ms": 1e3 * busy(seen)}
        result.append(row)
    return result


def captured(make: Make, model: Model) -> tuple[torch.optim.Optimizer, torch.cuda.CUDAGraph]:
    """An optimizer with its coefficients on the device, and a step of it as a graph."""
    optimizer = make(model.parameters, capturable=True)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(cuda_harness.WARM_UPS):
            optimizer.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    return optimizer, graph


def _all(workloads: Sequence[Workload]) -> Iterator[tuple[str, Make, Workload, Model]]:
    for workload in workloads:
        model = Model(workload, torch.float32, cuda_harness.DEVICE)
        model.hold_gradients()
        for name, make in OPTIMIZERS.items():
            yield name, make, workload, model
