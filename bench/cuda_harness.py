"""How steps are timed on a GPU."""

from __future__ import annotations

import functools
import gc
import math
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

import danlu
from cuda_memory import peak_allocated, scratch_bytes
from danlu.backends import BACKENDS
from harness import MOST_WRITTEN, Model, Turn, use_of_memory
from workloads import Workload

if TYPE_CHECKING:
    from contenders import Contender

Step = Callable[[], object]

DEVICE = "cuda"
BACKEND = "cuda"  # that danlu's contenders must take unless they name another
WARM_UPS = 2
SAMPLES = 5
CYCLES_PER_SECOND = 2e9  # at least, while a GPU sleeps
LONGEST_SLEEP = 0.5
GIGABYTE = 1 << 30


def unavailable() -> str | None:
    """Why there is nothing to measure here."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return BACKENDS["cuda"].unavailable()


class OnCuda:
    """A workload on the GPU. Models and gradients are shared by contenders, states live for a turn."""

    def __init__(self, workload: Workload, dtypes: set[torch.dtype]) -> None:
        self._workload = workload
        self._models = {dtype: Model(workload, dtype, DEVICE) for dtype in dtypes}
        for model in self._models.values():
            model.hold_gradients()
        self._kept: dict[str, torch.optim.Optimizer] = {}
        self._ceiling = CudaBandwidthCeiling(workload.elements)
        gc.collect()
        gc.freeze()  # else each collection between turns looks at all of torch again

    def zero_gradients(self) -> None:
        for model in self._models.values():
            for g in model.gradients:
                g.zero_()

    def turn(self, contender: Contender) -> Turn:
        optimizer = self._warm(contender)
        host = time_on_host(optimizer.step)
        step, host_bound = time_on_gpu(optimizer.step, host)
        touched = contender.bytes * self._workload.elements
        ceiling = self._ceiling.seconds(touched, contender.written)
        return Turn(step, ceiling, host, host_bound=host_bound)

    def memory(self, contender: Contender) -> dict[str, Any]:
        optimizer = self._optimizer(contender)
        used = use_of_memory(optimizer, self._workload.elements, peak_allocated)
        used["peak_extra_bytes"] += scratch_bytes(optimizer)
        if isinstance(optimizer, danlu.FusedOptimizer):
            for row in optimizer.backend_report():
                if row.backend != (contender.backend or BACKEND):
                    raise RuntimeError(f"{row.name} takes backend {row.backend}: {row.reason}")
        return used

    def profile(self, contender: Contender) -> dict[str, Any]:
        """Of one step: what the profiler says about its kernels."""
        seen = kernels(self._warm(contender).step)
        return {"kernel_seconds": busy(seen), "launches": len(seen)}

    def _warm(self, contender: Contender) -> torch.optim.Optimizer:
        optimizer = self._optimizer(contender)
        for _ in range(WARM_UPS):
            optimizer.step()
        return optimizer

    def _optimizer(self, contender: Contender) -> torch.optim.Optimizer:
        free()
        if contender.id in self._kept:
            return self._kept[contender.id]
        optimizer = contender.make(self._models[contender.dtype].parameters)
        if contender.kept:
            self._kept[contender.id] = optimizer
        return optimizer


def time_on_gpu(step: Step, host: float) -> tuple[float, bool]:
    """Seconds that the GPU takes for a step, the median of some; and whether the host held it up in one.

    Between two events around the step on torch's current stream: kernels, and the gaps between them. Before
    the first event the GPU spins for longer than the host needs to enqueue the step (`host` seconds), so
    that all of it waits in the stream when the GPU comes to it. Where the GPU has passed the first event when
    the host is done, as where a step waits for the GPU or has more launches than the stream holds, the host
    is in the time, and that is told.
    """
    samples = []
    host_bound = False
    for _ in range(SAMPLES):
        seconds, late = _time_one(step, 1.5 * host + 1e-3)
        if late:
            seconds, late = _time_one(step, 4 * host + 1e-2)
        samples.append(seconds)
        host_bound |= late
    return statistics.median(samples), host_bound


def _time_one(step: Step, head_start: float) -> tuple[float, bool]:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(int(min(head_start, LONGEST_SLEEP) * CYCLES_PER_SECOND))
    start.record()
    step()
    end.record()
    late = start.query()
    torch.cuda.synchronize()
    return 1e-3 * start.elapsed_time(end), late


def time_on_host(step: Step) -> float:
    """Seconds until a step returns, the median of some; the GPU is idle before each, nothing waits for it."""
    samples = []
    for _ in range(SAMPLES):
        torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        samples.append(time.perf_counter() - start)
    torch.cuda.synchronize()
    return statistics.median(samples)


class CudaBandwidthCeiling:
    """What the memory gives to a step: a kernel over fp32 arrays that makes its reads and writes, and adds.

    Args:
        elements: of the largest model to compare with. More bytes than its arrays have take as much longer.
    """

    def __init__(self, elements: int) -> None:
        self._arrays = [torch.ones(elements, device=DEVICE) for _ in range(MOST_WRITTEN + 1)]

    def seconds(self, touched: int, written: int) -> float:
        """For as many bytes; Lion updates two arrays in place from another one, AdamW three."""
        from danlu import _cuda

        wanted = touched / (4 * (2 * written + 1))
        elements = min(int(wanted), len(self._arrays[0]))
        *updated, read = (array.data_ptr() for array in self._arrays)
        arguments = (
            updated[:written],
            read,
            elements,
            torch.cuda.current_device(),
            torch.cuda.current_stream().cuda_stream,
        )
        step = functools.partial(_cuda.bandwidth_ceiling, *arguments)
        step()
        return time_on_gpu(step, 1e-4)[0] * wanted / elements


def copy_bandwidth() -> float:
    """Bytes read and written in a second by torch's copy from one tensor to another."""
    source, target = (torch.ones(2 * GIGABYTE, dtype=torch.uint8, device=DEVICE) for _ in range(2))
    step = functools.partial(target.copy_, source)
    step()
    return 2 * source.nbytes / time_on_gpu(step, 1e-4)[0]


class Ran(NamedTuple):
    """A kernel, and when it ran, in seconds."""

    name: str
    start: float
    end: float


def busy(kernels: Iterable[Ran]) -> float:
    """Seconds in which any of them ran: some start while others end."""
    total, until = 0.0, -math.inf
    for kernel in sorted(kernels, key=lambda kernel: kernel.start):
        total += max(0.0, kernel.end - max(kernel.start, until))
        until = max(until, kernel.end)
    return total


def kernels(step: Step) -> list[Ran]:
    """The kernels that a step, which is not its first, runs."""
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        step()
        torch.cuda.synchronize()
    found = [
        Ran(e.name, 1e-6 * e.time_range.start, 1e-6 * e.time_range.end)
        for e in profile.events()
        if e.device_type == torch.autograd.DeviceType.CUDA
        and not e.is_user_annotation
        and not e.name.startswith(("Memcpy", "Memset", "Optimizer."))
    ]
    if not found:
        raise RuntimeError("the profiler saw no kernel")
    return found


def free() -> None:
    """Gives back what no one refers to."""
    gc.collect()
    torch.cuda.empty_cache()


def environment() -> dict[str, Any]:
    """What was measured on what, and with what."""
    from danlu import _cuda

    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "danlu": danlu.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "L2_bytes": properties.L2_cache_size,
        "cuda": torch.version.cuda,
        "driver": _driver(),
        "triton": _triton(),
        "built_for": _cuda.architectures,
    }


def _driver() -> str | None:
    if not shutil.which("nvidia-smi"):
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=30)
    return found.stdout.strip() or None


def _triton() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return str(triton.__version__)
