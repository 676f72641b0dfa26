"""torch.cuda and danlu._cuda as the benchmarks use them, over CPU tensors, and what was asked of them."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import cuda_harness
import danlu
from danlu.backends import BACKENDS
from danlu.backends.cpu import Cpu
from emulated import STREAM, emulated

CUDA = torch.autograd.DeviceType.CUDA


class FakeGpu:
    """Stands in for the GPU for one test."""

    def __init__(self) -> None:
        self.calls: list[str] = []  # in their order
        self.sleeps: list[int] = []
        self.late = False  # whether the GPU overtakes the host
        self.broken = False
        self.held, self.peak = 1000, 1500

    def install(self, patch: pytest.MonkeyPatch) -> None:
        if not torch.cuda.is_available():
            patch.setattr(torch.cuda, "_sleep", self._sleep)
        replaced: dict[str, Any] = {
            "Event": lambda enable_timing: FakeEvent(self),
            "synchronize": self._synchronize,
            "current_stream": lambda: SimpleNamespace(cuda_stream=STREAM, wait_stream=lambda other: None),
            "current_device": lambda: 0,
            "memory_allocated": lambda: self.held,
            "max_memory_allocated": lambda: self.peak,
            "reset_peak_memory_stats": lambda: self.calls.append("reset_peak"),
            "empty_cache": lambda: self.calls.append("empty_cache"),
            "get_device_capability": lambda: (9, 0),
            "get_device_properties": lambda index: PROPERTIES,
            "Stream": lambda: SimpleNamespace(wait_stream=lambda other: None),
            "stream": lambda stream: contextlib.nullcontext(),
            "CUDAGraph": lambda: SimpleNamespace(replay=lambda: self.calls.append("replay")),
            "graph": lambda graph: contextlib.nullcontext(),
        }
        for name, value in replaced.items():
            assert hasattr(torch.cuda, name), name
            patch.setattr(torch.cuda, name, value)
        patch.setattr(torch.profiler, "profile", fake_profile)
        kernels = emulated().native
        native = SimpleNamespace(
            bandwidth_ceiling=kernels.bandwidth_ceiling,
            read_through=kernels.read_through,
            architectures="90-real",
        )
        patch.setattr(danlu, "_cuda", native, raising=False)
        patch.setitem(sys.modules, "danlu._cuda", native)
        patch.setattr(cuda_harness, "DEVICE", "cpu")
        patch.setattr(cuda_harness, "BACKEND", "cpu")
        patch.setitem(BACKENDS, "triton", InPlaceOfTriton())
        patch.setattr(cuda_harness, "GIGABYTE", 1000)
        patch.setattr(cuda_harness, "unavailable", lambda: None)

    def step(self) -> None:
        self.calls.append("step")

    def _sleep(self, cycles: int) -> None:
        self.calls.append("sleep")
        self.sleeps.append(cycles)

    def _synchronize(self) -> None:
        if self.broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        self.calls.append("synchronize")


class InPlaceOfTriton(Cpu):
    name = "triton"


class FakeEvent:
    def __init__(self, gpu: FakeGpu) -> None:
        self._gpu = gpu
        self._at = 0.0

    def record(self) -> None:
        self._gpu.calls.append("record")
        self._at = time.perf_counter()

    def query(self) -> bool:
        self._gpu.calls.append("query")
        return self._gpu.late

    def elapsed_time(self, end: FakeEvent) -> float:
        return 1e3 * (end._at - self._at)


PROPERTIES = SimpleNamespace(
    name="Fake GPU",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=80 << 30,
    L2_cache_size=50 << 20,
)


def event(
    name: str, us: float, device: Any = CUDA, annotation: bool = False, start: float = 0.0
) -> SimpleNamespace:
    return SimpleNamespace(
        name=name,
        device_type=device,
        is_user_annotation=annotation,
        time_range=SimpleNamespace(start=start, end=start + us),
    )


EVENTS = [
    event("void danlu::apply_kernel<...>(danlu::LaunchList<4096>)", 100.0),
    event("void at::native::multi_tensor_apply_kernel<...>", 50.0, start=100.0),
    event("Memcpy HtoD (Pinned -> Device)", 7.0),
    event("Memset (Device)", 7.0),
    event("Optimizer.step#AdamW.step", 900.0),
    event("a region of the user", 900.0, annotation=True),
    event("cudaLaunchKernel", 7.0, torch.autograd.DeviceType.CPU),
]


@contextlib.contextmanager
def fake_profile(activities: list[Any], acc_events: bool) -> Iterator[SimpleNamespace]:
    assert activities == [torch.profiler.ProfilerActivity.CUDA]
    yield SimpleNamespace(events=lambda: EVENTS)
