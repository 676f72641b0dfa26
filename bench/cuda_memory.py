"""What a step takes of a GPU's memory beside parameters, gradients and state."""

from __future__ import annotations

from collections.abc import Callable

import torch

from danlu.backends.reducing import ReducingTensors

Step = Callable[[], object]


def peak_allocated(step: Step) -> int:
    """The most bytes that torch's allocator held at once during a step, beyond what it held before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - held


def scratch_bytes(optimizer: torch.optim.Optimizer) -> int:
    """What danlu's plan for a GPU keeps for the sums of its passes, which was allocated at the first step."""
    plan = getattr(optimizer, "_plan", None)
    parts = plan._executors if plan else []
    by_cuda = [tensors for executor in parts for _, tensors in getattr(executor, "_reducing", [])]
    by_triton = [
        getattr(launch, "tensors", None) for executor in parts for launch in getattr(executor, "launches", [])
    ]
    reducing = [tensors for tensors in (*by_cuda, *by_triton) if isinstance(tensors, ReducingTensors)]
    return sum(tensors.scratch.nbytes for tensors in reducing)
