"""Steps under FakeTensorMode, by which torch estimates memory: the state of real ones, and no numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

import danlu
from cases import ALL
from danlu.plan import Plan
from wrapped import MAKERS, WRAPPERS

Make = Callable[..., Any]
# torch's Adafactor does not step there itself
RULES: dict[str, Make] = {name: make for name, make in MAKERS.items() if name != "torch-adafactor"}
RULES |= {case.id: case.make for case in ALL}
CLIPPED: dict[str, Make] = {
    f"clipped-{name}": lambda params, name=name, **engine: MAKERS[name](params, max_grad_norm=1.0, **engine)
    for name in ("adamw", "lamb")
}
AROUND: dict[str, Make] = {
    f"{wrapping.id}-{name}": lambda params, name=name, wrapping=wrapping, **engine: wrapping.make(
        RULES[name](params, **engine)
    )
    for wrapping in WRAPPERS
    for name in ("adamw", "lazy-adamw", "torch-adamw")
}


def run(make: Make, steps: int = 4, **engine: Any) -> Any:
    dtypes = (torch.bfloat16, torch.float32, torch.float64)
    params = [torch.nn.Parameter(torch.ones(n, 5, dtype=dtype)) for n, dtype in enumerate(dtypes, 2)]
    opt = make(params, **engine)
    for _ in range(steps):
        for p in params:
            p.grad = torch.ones_like(p)
        opt.step()
        opt.zero_grad()
    return opt


def looks(opt: Any) -> dict[Any, Any]:
    """Of all state: shape, dtype, strides; of counters the number."""
    return {
        (index, key): (t.shape, t.dtype, t.stride(), t.device, t.item() if "step" in key else None)
        for index, held in opt.state_dict()["state"].items()
        for key, t in held.items()
    }


@pytest.mark.parametrize("sizes", [(8,), (2, 4)])
def test_shards(sizes: tuple[int, ...]) -> None:
    """Under FSDP2 and HSDP, over pretended ranks: nobody is asked."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    try:
        mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("replicate", "shard")[-len(sizes) :])
        for make in (*(MAKERS[name] for name in ("adamw", "lamb", "adafactor")), *CLIPPED.values()):
            with FakeTensorMode(), mock.patch.object(dist, "all_reduce", side_effect=AssertionError):
                model = torch.nn.Linear(64, 48)
                fully_shard(model, mesh=mesh)
                opt = make(model.parameters())
                for p in model.parameters():
                    p.grad = torch.ones_like(p)
                for _ in range(2):
                    opt.step()
                for p in model.parameters():
                    assert opt.state[p]["step"].item() == 2
                    assert all(isinstance(t, DTensor) for key, t in opt.state[p].items() if key != "step")
    finally:
        dist.destroy_process_group()


def test_a_step_has_no_sums_to_stop_at() -> None:
    with FakeTensorMode():
        opt = run(danlu.LAMB, steps=1)
        for p in opt.param_groups[0]["params"]:
            p.grad = torch.ones_like(p)
        (executor,) = Plan(opt)._executors
        assert list(executor.rounds()) == []
        assert {held["step"].item() for held in opt.state.values()} == {2}


@pytest.mark.parametrize("name", [*RULES, *CLIPPED, *AROUND])
def test_state_is_as_in_real_steps(name: str) -> None:
    make = {**RULES, **CLIPPED, **AROUND}[name]
    with FakeTensorMode():
        opt = run(make)
        assert all(
            type(t) is FakeTensor for held in opt.state_dict()["state"].values() for t in held.values()
        )
        found = looks(opt)
    real = looks(run(make))
    assert found == real


@pytest.mark.parametrize("engine", [{}, {"backend": "cpu"}, {"fused": True}, {"fused": False}], ids=str)
def test_no_setting_reads_fake_data(engine: dict[str, Any]) -> None:
    with FakeTensorMode():
        run(danlu.AdamW, lr=torch.tensor(1e-3), **engine)
        opt = run(danlu.AdamW, state_dtype=torch.bfloat16, **engine)
        rows = opt.backend_report()
        assert {(row.backend, row.reason) for row in rows} == {
            ("reference", "it is a fake tensor, which has no data")
        }
        other = run(danlu.AdamW, steps=0, state_dtype=torch.bfloat16, **engine)
        other.load_state_dict(opt.state_dict())
        assert looks(other) == looks(opt)


@pytest.mark.parametrize("options", [{}, {"capturable": True}, {"max_grad_norm": 1.0}], ids=str)
@pytest.mark.parametrize("make", [danlu.AdamW, danlu.LAMB], ids=lambda m: m.__name__)
def test_a_gpu_is_not_needed(make: Make, options: dict[str, Any]) -> None:
    with FakeTensorMode():
        p = torch.nn.Parameter(torch.empty(4, 3, device="cuda"))
        opt = make([p], **options)
        for _ in range(2):
            p.grad = torch.empty_like(p)
            opt.step()
        other = make([torch.nn.Parameter(torch.empty(4, 3, device="cuda"))], **options)
        other.load_state_dict(opt.state_dict())
        held = other.state_dict()["state"][0]
    assert held["exp_avg"].device == p.device
    assert held["step"].is_cpu == ("capturable" not in options)


def test_a_gradient_that_lists_rows() -> None:
    with FakeTensorMode():
        embedding = torch.nn.Embedding(9, 4, sparse=True)
        opt = danlu.Lazy(danlu.AdamW(embedding.parameters()))
        for _ in range(2):
            embedding(torch.tensor([1, 1, 2])).sum().backward()
            opt.step()
            opt.zero_grad()
        assert opt.state[embedding.weight]["exp_avg"].shape == (9, 4)


def test_gradients_under_a_scaler() -> None:
    """As torch's fused AdamW, which leaves the scaler's tensors unread."""
    with FakeTensorMode():
        model = torch.nn.Linear(3, 2)
        opt, scaler = danlu.AdamW(model.parameters(), fused=True), torch.amp.GradScaler("cpu")
        for _ in range(2):
            scaler.scale(model(torch.ones(1, 3)).sum()).backward()
            scaler.step(opt)
            scaler.update()
            opt.zero_grad()


@pytest.mark.parametrize("started", [False, True], ids=["first step", "later step"])
@pytest.mark.parametrize("what", ["gradient", "state"])
def test_fake_beside_real_is_named(what: str, started: bool, backend: str) -> None:
    good, p = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    opt = danlu.AdamW([good, p], backend=backend)
    good.grad, p.grad = torch.ones(3), torch.ones(3)
    if started:
        opt.step()
    with FakeTensorMode():
        fake = torch.ones(3)
    if what == "gradient":
        p.grad = fake
    else:
        opt.state[p]["exp_avg"] = fake
    before = good.detach().clone()
    with pytest.raises(
        TypeError, match=rf"params'\]\[1\]: the parameter is a real tensor, the {what} .*a fake one"
    ):
        opt.step()
    assert torch.equal(good, before)
