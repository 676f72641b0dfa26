"""How steps are timed on the CPU, the bandwidth ceiling among them, and what every benchmark needs."""

from __future__ import annotations

import argparse
import dataclasses
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import danlu
from danlu import _cpu
from danlu.backends.cpu import instruction_set
from workloads import Workload

if TYPE_CHECKING:
    from contenders import Contender

ROOT = Path(__file__).resolve().parent.parent
MOST_WRITTEN = 3
STEPS_PER_TURN = 2

# else the profiler writes a line to stderr whenever it starts and stops
os.environ.setdefault("KINETO_LOG_LEVEL", "99")


class Model:
    """Parameters of a workload's shapes, and what gives them gradients."""

    def __init__(self, workload: Workload, dtype: torch.dtype, device: str = "cpu") -> None:
        generator = torch.Generator(device).manual_seed(0)

        def normal(shape: tuple[int, ...], scale: float) -> torch.Tensor:
            return torch.randn(shape, generator=generator, device=device).mul_(scale).to(dtype)

        self.parameters = [torch.nn.Parameter(normal(shape, 0.02)) for shape in workload.shapes]
        self.gradients = [normal(shape, 1e-3) for shape in workload.shapes]

    def backward(self) -> None:
        """New gradients from autograd, as a training loop has them at every step."""
        for p in self.parameters:
            p.grad = None
        torch.autograd.backward(self.parameters, self.gradients)

    def hold_gradients(self) -> None:
        """The same gradients for every step that follows."""
        for p, g in zip(self.parameters, self.gradients, strict=True):
            p.grad = g


@dataclasses.dataclass(frozen=True)
class Turn:
    """Seconds for a step of one contender in one round."""

    step: float
    ceiling: float  # of as many bytes
    host: float  # the host's work
    kernel: float | None = None  # the part of the step without Python, where each step tells it
    host_bound: bool = False  # whether the device had to wait for the host all the same


class OnCpu:
    """A workload on the CPU."""

    def __init__(self, workload: Workload, dtypes: set[torch.dtype]) -> None:
        self._workload = workload
        self._models = {dtype: Model(workload, dtype) for dtype in dtypes}
        self._single_elements = {dtype: Model(workload.single_elements(), dtype) for dtype in dtypes}
        self._ceiling = BandwidthCeiling(workload.elements)

    def turn(self, contender: Contender) -> Turn:
        host, _ = self._timed(contender, self._single_elements[contender.dtype])
        step, kernel = self._timed(contender, self._models[contender.dtype])
        touched = contender.bytes * self._workload.elements
        return Turn(step, self._ceiling.seconds(touched, contender.written), host, kernel)

    def memory(self, contender: Contender) -> dict[str, Any]:
        model = self._models[contender.dtype]
        model.backward()
        return use_of_memory(contender.make(model.parameters), self._workload.elements, peak_allocated)

    @staticmethod
    def _timed(contender: Contender, model: Model) -> tuple[float, float | None]:
        """Seconds for a step, and for the executor of it that runs without Python."""
        optimizer = contender.make(model.parameters)
        model.backward()
        optimizer.step()
        clock = KernelClock.attach(optimizer)
        seconds = time_steps(optimizer.step, model.backward, STEPS_PER_TURN)
        return seconds, clock.seconds / STEPS_PER_TURN if clock else None


def time_steps(step: Callable[[], object], before: Callable[[], object], count: int) -> float:
    """Mean seconds of `count` steps; what `before` does ahead of each is not counted."""
    total = 0.0
    for _ in range(count):
        before()
        start = time.perf_counter()
        step()
        total += time.perf_counter() - start
    return total / count


class BandwidthCeiling:
    """What the memory gives to a step: a loop over fp32 arrays that makes its reads and writes, and adds.

    Args:
        elements: of the largest model to compare with. More bytes than its arrays have take as much longer.
    """

    def __init__(self, elements: int) -> None:
        self._arrays = [torch.ones(elements) for _ in range(MOST_WRITTEN + 1)]

    def seconds(self, touched: int, written: int) -> float:
        """For as many bytes; Lion updates two arrays in place from another one, Adam three."""
        wanted = touched / (4 * (2 * written + 1))
        elements = min(int(wanted), len(self._arrays[0]))
        addresses = [array.data_ptr() for array in self._arrays]
        threads = torch.get_num_threads()

        def update() -> None:
            _cpu.bandwidth_ceiling(addresses[:written], addresses[-1], elements, threads)

        update()
        return time_steps(update, lambda: None, 2) * wanted / elements


class KernelClock:
    """Stands before the native list of an optimizer's plan and times what runs without Python."""

    def __init__(self, native: _cpu.Step) -> None:
        self._native = native
        self.seconds = 0.0

    def __getattr__(self, name: str) -> object:
        return getattr(self._native, name)

    def run(self, rows: list[tuple[float, ...]], threads: int) -> None:
        start = time.perf_counter()
        self._native.run(rows, threads)
        self.seconds += time.perf_counter() - start

    @classmethod
    def attach(cls, optimizer: torch.optim.Optimizer) -> KernelClock | None:
        """None if the optimizer, which must have made a step, is not danlu's."""
        if not isinstance(optimizer, danlu.FusedOptimizer):
            return None
        plan = optimizer._plan
        assert plan is not None
        (executor,) = plan._executors
        executor._native = cls(executor._native)
        return executor._native


def peak_allocated(step: Callable[[], object]) -> int:
    """The most bytes that torch's allocators held at once during a step, beyond what they held before."""
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        step()
    events = [e for e in profile.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def use_of_memory(
    optimizer: torch.optim.Optimizer, elements: int, peak: Callable[[Callable[[], object]], int]
) -> dict[str, Any]:
    """Of an optimizer that may be new; its second step is looked at."""
    optimizer.step()
    return {
        "state_bytes_per_parameter": state_bytes(optimizer) / elements,
        "peak_extra_bytes": peak(optimizer.step) + scratch_bytes(optimizer),
    }


def scratch_bytes(optimizer: torch.optim.Optimizer) -> int:
    """What native kernels keep between the passes of a step, which torch's allocators do not see."""
    plan = getattr(optimizer, "_plan", None)
    natives = [getattr(executor, "_native", None) for executor in plan._executors] if plan else []
    threads = torch.get_num_threads()
    return sum(native.scratch_bytes(threads) for native in natives if hasattr(native, "scratch_bytes"))


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    tensors = (x for state in optimizer.state.values() for x in state.values() if torch.is_tensor(x))
    return sum(x.nbytes for x in tensors)


@dataclasses.dataclass(frozen=True)
class Spread:
    """The median of a sample and its quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, sample: Sequence[float]) -> Spread:
        if len(sample) < 2:
            return cls(sample[0], sample[0], sample[0])
        low, median, high = statistics.quantiles(sample, n=4, method="inclusive")
        return cls(median, low, high)


def environment() -> dict[str, object]:
    """What was measured on what, and with what."""
    return {
        "danlu": danlu.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": cpu_name(),
        "instruction_set": instruction_set(),
        "threads": torch.get_num_threads(),
    }


def cpu_name() -> str:
    """The processor's name where the system gives it, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def positive(text: str) -> int:
    """The type of a command-line option that counts something."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number
