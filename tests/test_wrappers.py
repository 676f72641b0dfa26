"""What holds for every wrapper around every optimizer, danlu's and torch's."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

import danlu
from cases import BF16, F32, STORAGES, Storage, set_gradient, values
from danlu.testing import same_bits
from emulated import Emulated
from training import all_same, give_gradients, parameters, some_params, train
from wrapped import WRAPPED, WRAPPERS, Wrapping

every_wrapper = pytest.mark.parametrize("wrapping", WRAPPERS, ids=lambda w: w.id)


def everything(opt: Any) -> list[torch.Tensor]:
    """Parameters, and all that a state_dict holds of them, in the order of its keys."""
    saved = opt.state_dict()["state"]
    states = [saved[index][key] for index in sorted(saved) for key in sorted(saved[index])]
    return [p.detach().clone() for p in parameters(opt)] + [x.clone() for x in states if x is not None]


def through_a_file(state_dict: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@every_wrapper
def test_resumes_in_the_middle_of_a_cycle(make: Callable[..., Any], wrapping: Wrapping) -> None:
    """Saved and loaded, copied, pickled after any number of steps: the same bits further on."""
    opt = wrapping.make(make(some_params()))
    for t in range(2 * wrapping.period + 1):
        train(opt, [t])
        params = [torch.nn.Parameter(p.detach().clone()) for p in parameters(opt)]
        loaded = wrapping.make(make(params))
        loaded.load_state_dict(through_a_file(opt.state_dict()))
        others = [loaded]
        if t == 1:
            others += [copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))]
        on = copy.deepcopy(opt)
        for other in (on, *others):
            train(other, range(100, 100 + wrapping.period))
        for other in others:
            assert all_same(everything(other), everything(on)), t


@every_wrapper
def test_a_state_dict_of_the_optimizer_alone(make: Callable[..., Any], wrapping: Wrapping) -> None:
    """Loads, and the wrapper starts anew; and a wrapper's loads into no other."""
    alone = make(some_params())
    train(alone, range(3))
    params = [torch.nn.Parameter(p.detach().clone()) for p in parameters(alone)]
    opt = wrapping.make(make(some_params()))
    train(opt, range(2))
    before = everything(opt)
    broken = copy.deepcopy(opt.state_dict())
    broken["param_groups"][0]["params"].append(7)
    with pytest.raises(ValueError, match="group"):
        opt.load_state_dict(broken)
    assert all_same(everything(opt), before)
    fresh = wrapping.make(make(params))
    fresh.load_state_dict(alone.state_dict())
    again = wrapping.make(make([torch.nn.Parameter(p.detach().clone()) for p in params]))
    again.load_state_dict(copy.deepcopy(alone.state_dict()))
    for other in (fresh, again):
        train(other, range(4))
    assert all_same(everything(fresh), everything(again))


@every_wrapper
def test_schedulers_closures_groups(make: Callable[..., Any], wrapping: Wrapping) -> None:
    """A scheduler and late groups reach the optimizer; the closure's loss comes back, it runs once a call."""
    opt = wrapping.make(make(some_params(2)))
    assert isinstance(opt, torch.optim.Optimizer)
    late = torch.nn.Parameter(torch.ones(3, 4))
    calls = []

    def closure() -> float:
        assert torch.is_grad_enabled()
        opt.zero_grad()
        calls.append(1)
        give_gradients(parameters(opt), len(calls))
        return float(len(calls))

    assert opt.step(closure) == len(calls) == 1
    opt.add_param_group({"params": [late], "lr": 0.1})
    scheduler = torch.optim.lr_scheduler.LambdaLR(opt, lambda t: 1 / (1 + t))
    for t in range(2 * wrapping.period):
        assert opt.step(closure) == len(calls) == t + 2
        scheduler.step()
        assert opt.param_groups[1]["lr"] == pytest.approx(0.1 / (2 + t))
        assert opt.param_groups[1] is opt.optimizer.param_groups[1]
    assert opt.defaults is opt.optimizer.defaults
    assert opt.state is opt.optimizer.state
    assert not torch.equal(late, torch.ones(3, 4))
    assert repr(opt).startswith(f"{type(opt).__name__}(")


@every_wrapper
def test_a_grad_scaler(make: Callable[..., Any], wrapping: Wrapping) -> None:
    """It unscales by itself, and a step that it leaves out is none for the wrapper either."""
    a, b = wrapping.make(make(some_params())), wrapping.make(make(some_params()))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1000)
    scaler.scale(torch.zeros(()))
    for t in range(2 * wrapping.period + 1):
        give_gradients(parameters(a), t, scaler.get_scale())
        if t == 1:
            parameters(a)[0].grad[0, 0] = float("inf")  # type: ignore[index]
        scaler.step(a)
        scaler.update()
        if t != 1:
            train(b, [t])
    assert all_same(everything(a), everything(b))


@every_wrapper
def test_hooks_and_reports(wrapping: Wrapping) -> None:
    opt = wrapping.make(danlu.AdamW(some_params(), backend="reference"))
    seen: list[str] = []
    opt.register_step_pre_hook(lambda *_: seen.append("before"))
    opt.register_step_post_hook(lambda *_: seen.append("after"))
    opt.register_state_dict_post_hook(lambda _, saved: {**saved, "more": 1})
    opt.register_load_state_dict_pre_hook(lambda _, saved: {k: v for k, v in saved.items() if k != "more"})
    opt.register_load_state_dict_post_hook(lambda _: seen.append("loaded"))
    train(opt, [0])
    saved = opt.state_dict()
    assert saved["more"] == 1
    opt.load_state_dict(saved)
    assert seen == ["before", "after", "loaded"]
    assert {row.backend for row in opt.backend_report()} == {"reference"}


STORED = [s for s in STORAGES if s.moment in (F32, BF16)]


@pytest.mark.parametrize("storage", STORED, ids=lambda s: s.id)
@pytest.mark.parametrize("case", [c for c in WRAPPED if not c.reduces], ids=lambda c: c.id)
@every_wrapper
def test_the_bits_of_the_reference(case: Any, wrapping: Wrapping, storage: Storage, backend: str) -> None:
    """With None, wild and missing gradients, layouts, and averages in place at the end."""
    if backend == "reference":
        return
    results = []
    for one in (backend, "reference"):
        params = [
            torch.nn.Parameter(values((17, 9), 0).to(storage.param)),
            torch.nn.Parameter(values((9, 17), 1).to(storage.param).t()),
            torch.nn.Parameter(values((1 << 15,), 2).to(storage.param)[3:]),
            torch.nn.Parameter(values((), 3).to(storage.param)),
            torch.nn.Parameter(torch.zeros(0, dtype=storage.param)),
        ]
        groups = [{"params": params[:2]}, {"params": params[2:], "lr": 1e-2, "maximize": True}]
        opt = wrapping.make(case.make(groups, backend=one, state_dtype=storage.moment))
        for t in range(7):
            for i, p in enumerate(params):
                if (t + i) % 4 == 3:
                    p.grad = None
                else:
                    g = torch.empty_like(p, dtype=storage.grad)
                    set_gradient(p, g.copy_(values(p.shape, 50 * t + i)))
            opt.step()
        assert {row.backend for row in opt.backend_report()} == {one}
        results.append(everything(opt))
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))


@every_wrapper
def test_lr_zero_changes_no_parameter(make: Callable[..., Any], wrapping: Wrapping) -> None:
    """And makes the state that a checkpoint needs, once a step is made."""
    opt = wrapping.make(make(some_params()))
    for group in opt.param_groups:
        group["lr"] = 0.0
    before = [p.detach().clone() for p in parameters(opt)]
    for t in range(2 * wrapping.period):
        train(opt, [t])
    assert all(torch.equal(p, q) for p, q in zip(parameters(opt), before, strict=True))
    assert opt.optimizer.state_dict()["state"].keys() == {0, 1, 2}


READS_AND_WRITES = {  # bytes of an fp32 element, of a bf16 one with an fp32 state
    "accumulation": ((8, 4), (6, 4)),
    "lookahead": ((8, 8), (6, 6)),
    "ema": ((8, 4), (6, 4)),
}


@pytest.mark.parametrize("wrapping", WRAPPERS[:3], ids=lambda w: w.id)
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_traffic(wrapping: Wrapping, dtype: torch.dtype, cuda: Emulated) -> None:
    """Nothing but what the formula names."""
    p = torch.nn.Parameter(torch.ones(1 << 16, dtype=dtype))
    p.grad = torch.ones_like(p)
    opt = wrapping.make(danlu.Lion([p], backend="cuda"))
    opt.step()
    cuda.native.reset()
    cuda.native.machine().count_traffic()
    opt._pass.step()
    machine = cuda.native.machine()
    assert len(machine.launches) == 1
    per_element = machine.bytes_read / p.numel(), machine.bytes_written / p.numel()
    assert per_element == READS_AND_WRITES[wrapping.id][dtype == BF16]


@pytest.mark.parametrize("backend", ["cpu", "cuda", "reference"])
@pytest.mark.parametrize("wrapping", WRAPPERS[:3], ids=lambda w: w.id)
def test_autograd_is_told_of_what_is_written(wrapping: Wrapping, backend: str, cuda: Emulated) -> None:
    """A pass that leaves the parameter alone may run while a graph holds it."""
    p = torch.nn.Parameter(torch.ones(5))
    p.grad = torch.ones_like(p)
    opt = wrapping.make(danlu.Lion([p], backend=backend))
    opt.step()
    version = p._version
    opt._pass.step()
    assert (p._version > version) == (wrapping.id == "lookahead")


def test_orders_that_make_no_sense() -> None:
    opt = danlu.Lion(some_params())
    accumulation = danlu.GradientAccumulation(opt, 2)
    with pytest.raises(TypeError, match=r"EMA goes inside GradientAccumulation, not around it"):
        danlu.EMA(accumulation)
    with pytest.raises(TypeError, match="Lookahead goes inside"):
        danlu.Lookahead(accumulation)
    with pytest.raises(TypeError, match="optimizer is wrapped in GradientAccumulation already"):
        danlu.GradientAccumulation(accumulation, 2)
    with pytest.raises(TypeError, match="optimizer is wrapped in EMA already"):
        danlu.EMA(danlu.Lookahead(danlu.EMA(opt)))
    with pytest.raises(TypeError, match="accumulation_steps must be 1"):
        danlu.Lookahead(danlu.Tiger(some_params(), accumulation_steps=2))
    with pytest.raises(TypeError, match="takes no LBFGS"):
        danlu.EMA(torch.optim.LBFGS(some_params()))
    for wrapping in WRAPPERS:
        with pytest.raises(TypeError, match=r"optimizer must be a torch.optim.Optimizer, got list"):
            wrapping.make(some_params())  # type: ignore[arg-type]
    danlu.EMA(danlu.Lookahead(opt))
    danlu.Lookahead(danlu.EMA(opt))


@pytest.mark.parametrize("value", [0, 1.5, True, -1, "2"])
def test_counts_out_of_their_range(value: Any) -> None:
    with pytest.raises(ValueError, match=r"^steps must be an integer of at least 1"):
        danlu.GradientAccumulation(danlu.Lion(some_params()), value)
    with pytest.raises(ValueError, match=r"^k must be an integer of at least 1"):
        danlu.Lookahead(danlu.Lion(some_params()), k=value)


def test_rates_out_of_their_range() -> None:
    for value in (0.0, -0.1, 1.1, float("nan"), True, "1"):
        with pytest.raises(ValueError, match=r"^alpha must be"):
            danlu.Lookahead(danlu.Lion(some_params()), alpha=value)  # type: ignore[arg-type]
    for value in (1.0, -0.1, float("nan"), True, None):
        with pytest.raises(ValueError, match=r"^decay must be"):
            danlu.EMA(danlu.Lion(some_params()), decay=value)  # type: ignore[arg-type]
    danlu.Lookahead(danlu.Lion(some_params()), alpha=1)


@every_wrapper
def test_states_that_do_not_fit(wrapping: Wrapping) -> None:
    """A loaded state is looked at before anything is taken; the message names parameter and state."""
    opt = wrapping.make(danlu.Lion([("weight", p) for p in some_params(1)]))
    train(opt, range(wrapping.period + 1))
    before = everything(opt)
    own = {"accumulation": "mean_grad", "lookahead": "slow", "ema": "ema", "three": "mean_grad"}[wrapping.id]
    for wrong, error in ((torch.ones(7), ValueError), ("text", TypeError)):
        saved = copy.deepcopy(opt.state_dict())
        assert own in saved["state"][0]
        saved["state"][0][own] = wrong
        with pytest.raises(error, match=rf"^weight: state '{own}'"):
            opt.load_state_dict(saved)
        assert all_same(everything(opt), before)
