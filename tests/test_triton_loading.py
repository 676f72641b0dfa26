"""Triton's kernels are loaded before anything is launched, and never inside a capture."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import danlu
from cases import values
from danlu import capture
from danlu.backends import triton as backend
from training import all_same, give_gradients

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

DEVICE = 11  # a number of its own keeps Triton's caches in memory apart from those of other tests


class Driver:
    """Stands for a Hopper GPU; `calls` has what is loaded and launched, in order."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str]] = []
        self.fails: str | None = None
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": 232448},
            load_binary=self._load,
            unload_module=lambda module: None,
        )

    def get_current_device(self) -> int:
        return DEVICE

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        return lambda *arguments: self.calls.append(("launch", metadata.name))

    def _load(self, name: str, *arguments: Any) -> tuple[Any, ...]:
        if self.fails == name:
            raise RuntimeError(f"cuModuleLoadData: {name}")
        self.calls.append(("load", name))
        return object(), 1, 32, 0, 1024


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    made = Driver()
    monkeypatch.setattr(backend.Triton, "device_types", ("cpu",))
    monkeypatch.setattr(backend.Triton, "unavailable", lambda self: None)
    monkeypatch.setattr(triton.runtime.driver, "_active", made)
    yield made
    for function in jit_functions():
        kernels, *_ = function.device_caches.pop(DEVICE, ({},))
        for kernel in kernels.values():
            kernel.module = None  # which the driver that there is would unload


def jit_functions() -> list[JITFunction[Any]]:
    from danlu.triton_kernels import engine, norm
    from danlu.triton_kernels.reduce import KERNELS

    return [engine.apply_kernel, norm.squares, norm.norm, *KERNELS.values()]


def parameters() -> list[torch.nn.Parameter]:
    params = [torch.nn.Parameter(values((9, 8), 0, wild=False)) for _ in range(2)]
    give_gradients(params, 1)
    return params


MAKERS = {
    "element-wise": lambda params, **o: danlu.Lion(params, max_grad_norm=1.0, capturable=True, **o),
    "reducing": lambda params, **o: danlu.Tiger(
        params, scale_parameter=True, kind="matrix", capturable=True, **o
    ),
}
by_maker = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


@by_maker
def test_a_step_launches_what_is_loaded(make: Any, driver: Driver) -> None:
    """Of the kernels of the norm and those of the step all are loaded before the first of them runs."""
    opt = make(parameters(), backend="triton")
    opt.step()
    kinds = [kind for kind, _ in driver.calls]
    of_norm = 4 if opt.max_grad_norm is not None else 0
    for part in (kinds[:of_norm], kinds[of_norm:]):
        assert part == ["load"] * (len(part) // 2) + ["launch"] * (len(part) // 2)
    before = len(driver.calls)
    opt.step()
    assert {kind for kind, _ in driver.calls[before:]} == {"launch"}


@by_maker
def test_a_capture_loads_nothing(make: Any, driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    """It names what is missing, and takes what another optimizer has loaded."""
    with monkeypatch.context() as patch:
        patch.setattr(capture, "is_capturing", lambda device: True)
        params = parameters()
        opt = make(params, backend="triton")
        before = [p.detach().clone() for p in params]
        with pytest.raises(
            RuntimeError, match=r"needs kernels that are loaded, \w+ is not: take such a step"
        ):
            opt.step()
    assert not driver.calls
    assert all_same(params, before)
    assert not any(map(torch.count_nonzero, opt.state[params[0]].values()))
    make(parameters(), backend="triton").step()
    driver.calls.clear()
    with monkeypatch.context() as patch:
        patch.setattr(capture, "is_capturing", lambda device: True)
        opt.step()
    assert {kind for kind, _ in driver.calls} == {"launch"}


def test_a_kernel_that_does_not_load_changes_nothing(driver: Driver) -> None:
    params = parameters()
    opt = MAKERS["reducing"](params, backend="triton")
    driver.fails = "apply"
    before = [p.detach().clone() for p in params]
    with pytest.raises(RuntimeError, match="cuModuleLoadData: apply"):
        opt.step()
    assert all_same(params, before)
    assert not any(map(torch.count_nonzero, opt.state[params[0]].values()))
    assert not [name for kind, name in driver.calls if kind == "launch"]
    driver.fails = None
    opt.step()
    assert [name for kind, name in driver.calls if kind == "launch"]
