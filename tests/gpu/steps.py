"""What a step does on a GPU: its kernels, and that it neither waits nor allocates."""

from __future__ import annotations

from collections.abc import Callable

import torch


def kernels(step: Callable[[], object]) -> list[str]:
    """Names of what a step launches."""
    step()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        step()
        torch.cuda.synchronize()
    names = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    others = ("Memcpy", "Memset", "Optimizer.step")  # the last is torch's mark around the step
    return [name for name in names if not name.startswith(others)]


def assert_waits_for_nothing(step: Callable[[], object]) -> None:
    """And allocates nothing; a step that was made before."""
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.max_memory_allocated() == held
