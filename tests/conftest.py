"""Fixtures that several test files share."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import danlu
import quick_interpreter
from cases import BACKENDS as BACKENDS_HERE
from cases import INTERPRETED
from danlu.backends import BACKENDS
from danlu.backends.cpu import CPU
from danlu.backends.cuda import CUDA, CudaExecutor
from emulated import AVAILABLE, Emulated, emulated
from machine_code.executed import Executor, executor
from wrapped import MAKERS, makers

pytest_plugins = ["file_table", "selection"]
torch.set_num_threads(2)
# tests that compile the same kernels share them, from one run to the next
os.environ.setdefault("TRITON_CACHE_DIR", str(Path(__file__).resolve().parent.parent / "build" / "triton"))
collect_ignore = ["gpu"]  # what needs a GPU has a conftest.py of its own and is run by `make gpu`
if INTERPRETED:
    quick_interpreter.patch_once()
else:
    collect_ignore.append("interpreted")  # test_triton_interpreted.py runs it


@pytest.fixture(autouse=True)
def _same_threads() -> Iterator[None]:
    """Puts torch's thread count back after tests that change it."""
    threads = torch.get_num_threads()
    yield
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


@pytest.fixture
def one_thread() -> None:
    """For many steps of tiny tensors, where a second one waits for a core more than it helps."""
    torch.set_num_threads(1)


@pytest.fixture(params=BACKENDS_HERE)
def backend(request: pytest.FixtureRequest) -> str:
    """One of those that run in this process."""
    if request.param == "cuda":
        request.getfixturevalue("cuda")
    return str(request.param)


@pytest.fixture
def poisoned_scratch(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pass of a CUDA kernel reads what no pass of its step has written: NaN is there before each step."""
    launch = CudaExecutor.launch

    def launch_poisoned(executor: CudaExecutor) -> None:
        for _, tensors in executor._reducing:
            tensors.scratch.fill_(0xFF)  # NaN in float32 and in float64
        launch(executor)

    monkeypatch.setattr(CudaExecutor, "launch", launch_poisoned)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Emulated:
    """Lets `backend="cuda"` mean the emulator."""
    if not AVAILABLE:
        assert not os.environ.get("CI"), "CI runs on x86-64"
        pytest.skip("the emulator switches stacks in x86-64 assembly")
    monkeypatch.setitem(BACKENDS, "cuda", emulated())
    monkeypatch.setattr(emulated(), "dependent_launches", True)  # benches turn it off, and leave it so
    emulated().native.reset()
    return emulated()


@pytest.fixture
def gpu(request: pytest.FixtureRequest) -> str:
    """The GPU backend that runs in this process."""
    if INTERPRETED:
        return "triton"
    request.getfixturevalue("cuda")
    return "cuda"


@pytest.fixture(params=["cuda", "triton"])
def executed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Executor]:
    """A GPU backend over CPU tensors whose kernels are executed as they were compiled, to PTX."""
    with executor(request, monkeypatch) as found:
        yield found


@pytest.fixture(params=makers(), ids="-".join)
def make(request: pytest.FixtureRequest) -> Callable[..., torch.optim.Optimizer]:
    """Makes an optimizer that wrappers take, on one of its backends."""
    name, backend = request.param
    if backend == "cuda":
        request.getfixturevalue("cuda")
    return functools.partial(MAKERS[name], backend=backend)


@pytest.fixture(autouse=True)
def _doctest_names(doctest_namespace: dict[str, object]) -> None:
    doctest_namespace.update(danlu=danlu, torch=torch)


def pytest_configure(config: pytest.Config) -> None:
    if INTERPRETED:  # numpy computes there, and tells of overflows and NaN
        config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning:triton")
        config.addinivalue_line("filterwarnings", "ignore:Conversion of an array:DeprecationWarning:triton")


def pytest_sessionstart(session: pytest.Session) -> None:
    """A suite without the native kernels would prove nothing; it must not pass by skipping them."""
    reason = CPU.unavailable()
    if reason:
        pytest.exit(f"{reason}; build danlu before its tests", returncode=3)
    if os.environ.get("CI") and CUDA.native is None:
        pytest.exit(f"{CUDA.unavailable()}; CI needs nvcc", returncode=3)
