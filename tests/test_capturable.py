"""Counters and coefficients on the device, as captured graphs and GradScalers need them."""

from __future__ import annotations

import contextlib
import copy
import weakref
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import danlu
from cases import ALL, CASES, LAYERED, Case
from danlu import scale as step_scale
from danlu import state
from danlu.backends.gpu import GpuExecutor
from training import all_same, copies, everything, give_gradients, parameters, some_params

pytestmark = pytest.mark.usefixtures("cuda")
every_case = pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)


@pytest.fixture
def all_on_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor counts as one on a device."""
    monkeypatch.setattr(step_scale, "is_on_device", lambda value: isinstance(value, torch.Tensor))


def groups() -> list[dict[str, Any]]:
    a, b, c = some_params()
    return [{"params": [a]}, {"params": [b, c], "lr": 0.01, "maximize": True}]


class Operations(TorchDispatchMode):
    """Counts torch operations, and refuses those that would wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default)
        return func(*args, **(kwargs or {}))


@every_case
@pytest.mark.parametrize("scaling", ["none", "scaled", "clipped", "both"])
@pytest.mark.usefixtures("all_on_device")
def test_nothing_waits_for_the_device(case: Case, scaling: str) -> None:
    """An lr changed in place between steps, a GradScaler's tensors, clipping: the bits of the host's."""
    clips = dict(max_grad_norm=0.3) if scaling in ("clipped", "both") else {}
    opts = [case.make(groups(), backend=backend, **clips) for backend in ("cuda", "cpu")]
    on_device, on_host = opts
    lr = torch.tensor(float(case.hyper["lr"]))
    on_device.param_groups[0]["lr"] = lr
    for t in range(7):
        lr.fill_(0.0 if t == 5 else case.hyper["lr"] / (t + 1))
        on_host.param_groups[0]["lr"] = lr.item()
        scale = 1024.0 if scaling in ("scaled", "both") else 1.0
        for opt in opts:
            params = parameters(opt)
            give_gradients(params[: 2 if t == 3 else 3], t, scale)
            if t == 3:
                params[2].grad = None
            if scale != 1.0:
                opt.grad_scale = torch.tensor([scale])  # type: ignore[attr-defined]
                opt.found_inf = torch.tensor([0.0])  # type: ignore[attr-defined]
        if t == 0:
            on_device.step()  # makes state
        else:
            with Operations() as operations:
                on_device.step()
            # some twenty for each group, and more with a cycle
            assert len(operations.names) < 170
        step_scale.is_on_device = lambda value: False
        on_host.step()
        step_scale.is_on_device = lambda value: isinstance(value, torch.Tensor)
        assert all_same(everything(on_device), everything(on_host))


@pytest.mark.parametrize("case", [LAYERED["adamw"], LAYERED["lion"]], ids=lambda c: c.id)
@pytest.mark.usefixtures("all_on_device")
def test_layer_adaptation_does_not_wait_either(case: Case) -> None:
    on_device, on_host = (case.make(groups(), backend="cuda") for _ in range(2))
    lr = on_device.param_groups[0]["lr"] = torch.tensor(0.0)
    for t in range(4):
        on_host.param_groups[0]["lr"] = 0.01 / (t + 1)
        lr.fill_(on_host.param_groups[0]["lr"])
        for opt in (on_device, on_host):
            give_gradients(parameters(opt), t)
        on_host.step()
        with Operations() if t else contextlib.nullcontext():  # the first step makes state
            on_device.step()
        pairs = zip(parameters(on_device), parameters(on_host), strict=True)
        assert all(case.agrees(a.detach(), b.detach()) for a, b in pairs)


@every_case
@pytest.mark.usefixtures("all_on_device")
def test_found_inf_touches_nothing(case: Case) -> None:
    opt, other = (case.make(groups(), backend="cuda") for _ in range(2))
    for t in range(6):
        for o in (opt, other):
            give_gradients(parameters(o), t)
            o.found_inf = torch.tensor([0.0])  # type: ignore[attr-defined]
        if t in (2, 4):
            before = copies(opt)
            opt.found_inf.fill_(1.0)  # type: ignore[attr-defined]
            parameters(opt)[0].grad.fill_(float("inf"))  # type: ignore[union-attr]
            opt.step()
            assert all_same(everything(opt), before)
            continue
        opt.step()
        other.step()
        assert all_same(everything(opt), everything(other))


@pytest.mark.usefixtures("all_on_device")
def test_found_inf_at_the_very_first_step() -> None:
    opt = danlu.AdamW(some_params(), backend="cuda")
    start = copies(opt)
    give_gradients(parameters(opt), 0)
    opt.found_inf = torch.tensor([1.0])  # type: ignore[attr-defined]
    opt.step()
    assert all_same([p.detach() for p in parameters(opt)], start)
    assert all(not x.any() for state in opt.state.values() for x in state.values())


@every_case
def test_the_counters_move_with_the_first_tensor_on_a_device(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the host, then with a device's lr, then with a number again: on the device it stays."""
    opt, plain = case.make(groups(), backend="cuda"), case.make(groups(), backend="cpu")
    for t in range(6):
        for o in (opt, plain):
            give_gradients(parameters(o), t)
        lr = case.hyper["lr"] / (t + 1)
        plain.param_groups[0]["lr"] = lr
        opt.param_groups[0]["lr"] = torch.tensor(lr, dtype=torch.float64) if t in (2, 3) else lr
        with monkeypatch.context() as patch:
            patch.setattr(step_scale, "is_on_device", lambda value: isinstance(value, torch.Tensor))
            opt.step()
        plain.step()
        assert all_same(everything(opt), everything(plain))
        assert opt.counters_on_device == (t >= 2)
        assert opt._plan is not None
        assert [executor.reads_host for executor in opt._plan._executors] == [t < 2]


@every_case
def test_rows_and_counters_stay_where_they_are(case: Case) -> None:
    """What a captured graph has recorded must be what later steps write."""
    opt = case.make(groups(), backend="cuda", capturable=True)
    addresses = []
    for t in range(3):
        give_gradients(parameters(opt), t)
        opt.step()
        assert opt._plan is not None
        (executor,) = opt._plan._executors
        counters = [x.data_ptr() for state in opt.state.values() for x in state.values()]
        addresses.append([executor._on_device.table.data_ptr(), *counters])  # type: ignore[attr-defined]
    assert addresses[0] == addresses[1] == addresses[2]


@pytest.mark.parametrize(
    "case", [case for case in ALL if case.id in ("lion", "adafactor")], ids=lambda c: c.id
)
def test_what_a_graph_has_captured_outlives_a_new_plan(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """A replay reads the tables again that the captured step has read."""
    opt = case.make(groups(), backend="cuda", capturable=True)
    give_gradients(parameters(opt), 0)
    opt.step()
    with monkeypatch.context() as patch:
        patch.setattr(GpuExecutor, "is_capturing", lambda executor: True)
        opt.step()
    captured = weakref.ref(opt._plan)  # type: ignore[arg-type]
    opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(3, 5))]})
    opt.step()
    plain = weakref.ref(opt._plan)
    opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})
    assert captured() is not None
    assert plain() is None


def test_counters_move_to_where_they_belong(monkeypatch: pytest.MonkeyPatch) -> None:
    opt = danlu.AdamW(some_params(), backend="cuda")
    give_gradients(parameters(opt), 0)
    opt.step()
    (p, *_) = parameters(opt)
    monkeypatch.setattr(opt, "counter_device", lambda p: torch.device("meta"))
    held = state.ensure(opt, p, opt.param_groups[0])
    assert held["step"].is_meta
    assert not held["exp_avg"].is_meta


def test_a_capture_with_host_coefficients_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    opt = danlu.AdamW(some_params(), backend="cuda")
    give_gradients(parameters(opt), 0)
    opt.step()
    before = copies(opt)
    monkeypatch.setattr(GpuExecutor, "is_capturing", lambda executor: True)
    with pytest.raises(RuntimeError, match="needs capturable=True"):
        opt.step()
    assert all_same(everything(opt), before)


def test_capturable_survives_copies_and_checkpoints() -> None:
    opt = danlu.AdamW(some_params(), backend="cuda", capturable=True)
    other = danlu.AdamW(some_params(), backend="cuda", capturable=True)
    give_gradients(parameters(opt), 0)
    opt.step()
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    for p, q in zip(parameters(opt), parameters(other), strict=True):
        q.data.copy_(p.data)
    for o in (opt, other):
        give_gradients(parameters(o), 1)
        o.step()
    assert all_same(everything(opt), everything(other))
