"""What holds for every wrapper around every optimizer, danlu's and torch's."""

from __future__ import annotations

import copy
import functools
import io
import itertools
import pickle
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

import danlu
import training
from cases import BACKENDS, BF16, F32, INTERPRETED, STORAGES, set_gradient, values
from danlu.testing import same_bits
from danlu.wrappers.lazy import MODES
from danlu.wrappers.wrapper import Wrapper
from emulated import Emulated
from oracles import nested
from oracles.itself import normwise
from oracles.nested import Nested
from training import all_same, parameters, some_params
from wrapped import MAKERS, NESTED, WRAPPED, WRAPPERS, Wrapping, in_order, wrapped_makers

every_wrapper = pytest.mark.parametrize("wrapping", WRAPPERS, ids=lambda w: w.id)


@pytest.fixture(params=wrapped_makers(), ids=lambda x: f"{x[2].id}-{x[0]}-{x[1]}")
def made(request: pytest.FixtureRequest) -> tuple[Callable[..., Any], Wrapping]:
    """What makes an optimizer, and its wrappers."""
    name, backend, wrapping = request.param
    if backend == "cuda":
        request.getfixturevalue("cuda")
    return functools.partial(MAKERS[name], backend=backend), wrapping


def give_gradients(params: list[torch.nn.Parameter], t: int, factor: float = 1.0) -> None:
    """Of the last rows zeros: lazy optimizers leave them."""
    training.give_gradients(params, t, factor)
    for p in params:
        p.grad[-1] = 0  # type: ignore[index]


def train(opt: Any, steps: Iterable[int]) -> None:
    for t in steps:
        give_gradients(parameters(opt), t)
        opt.step()


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


def test_resumes_in_the_middle_of_a_cycle(made: tuple[Callable[..., Any], Wrapping]) -> None:
    """Saved and loaded, copied, pickled after any number of steps: the same bits further on."""
    make, wrapping = made
    opt = wrapping.make(make(some_params()))
    for t in range(wrapping.period + 2):
        train(opt, [t])
        assert opt.stepped == ((t + 1) % getattr(opt, "steps", 1) == 0)
        params = [torch.nn.Parameter(p.detach().clone()) for p in parameters(opt)]
        loaded = wrapping.make(make(params))
        loaded.load_state_dict(through_a_file(opt.state_dict()))
        assert loaded.param_groups[0].keys() == opt.param_groups[0].keys()
        others = [loaded]
        if t == 1:
            others += [copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))]
            assert all(other.stepped == opt.stepped for other in others[1:])
        on = copy.deepcopy(opt)
        for other in (on, *others):
            train(other, range(100, 100 + wrapping.period))
        for other in others:
            assert all_same(everything(other), everything(on)), t


def test_a_state_dict_of_the_optimizer_alone(made: tuple[Callable[..., Any], Wrapping]) -> None:
    """Loads, and the wrapper starts anew; and a wrapper's loads into no other."""
    make, wrapping = made
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
    opt.load_state_dict(copy.deepcopy(alone.state_dict()))
    with torch.no_grad():
        for p, q in zip(parameters(opt), params, strict=True):
            p.copy_(q)
    for other in (fresh, again, opt):
        train(other, range(4))
    assert all_same(everything(fresh), everything(again))
    assert all_same(everything(fresh), everything(opt))


def test_schedulers_closures_groups(made: tuple[Callable[..., Any], Wrapping]) -> None:
    """A scheduler and late groups reach the optimizer; the closure's loss comes back, it runs once a call."""
    make, wrapping = made
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

    with torch.no_grad():
        assert opt.step(closure) == len(calls) == 1
    opt.add_param_group({"params": [late], "lr": 0.1})
    scheduler = danlu.PiecewiseLinearLR(opt, {0: 1.0, 100: 0.0})
    for t in range(2 * wrapping.period):
        assert opt.step(closure) == len(calls) == t + 2
        scheduler.step()
        assert opt.param_groups[1]["lr"] == pytest.approx(0.1 * (99 - t) / 100)
        assert opt.param_groups[1] is opt.optimizer.param_groups[1]
    assert opt.defaults is opt.optimizer.defaults
    assert not torch.equal(late, torch.ones(3, 4))
    assert repr(opt).startswith(f"{type(opt).__name__}(")


def test_a_grad_scaler(made: tuple[Callable[..., Any], Wrapping]) -> None:
    """It unscales by itself, and a step that it leaves out is none for the wrapper either."""
    make, wrapping = made
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
    opt.register_state_dict_pre_hook(lambda _: seen.append("saving"))
    opt.register_state_dict_post_hook(lambda _, saved: {**saved, "more": 1})
    opt.register_load_state_dict_pre_hook(lambda _, saved: {k: v for k, v in saved.items() if k != "more"})
    opt.register_load_state_dict_post_hook(lambda _: seen.append("loaded"))
    train(opt, [0])
    saved = opt.state_dict()
    assert saved["more"] == 1
    opt.load_state_dict(saved)
    assert seen == ["before", "after", "saving", "loaded"]
    assert {row.backend for row in opt.backend_report()} == {"reference"}


# every wrapper with every storage on every backend; the optimizers take turns
IN_TURN = ["lion"] if INTERPRETED else [*(case.id for case in WRAPPED if not case.reduces), "lazy-adamw"]
BITS = [
    (wrapping, storage, backend)
    for storage in STORAGES
    if storage.moment in (F32, BF16)
    for backend in BACKENDS
    if backend != "reference"
    for wrapping in WRAPPERS
]


@pytest.mark.parametrize(
    "turn", range(len(BITS)), ids=lambda i: f"{BITS[i][0].id}-{BITS[i][1].id}-{BITS[i][2]}"
)
def test_the_bits_of_the_reference(turn: int, request: pytest.FixtureRequest) -> None:
    """With None, wild and missing gradients, layouts, and averages in place at the end."""
    wrapping, storage, backend = BITS[turn]
    if backend == "cuda":
        request.getfixturevalue("cuda")
    make = MAKERS[IN_TURN[turn % len(IN_TURN)]]
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
        for group, lazy in zip(groups, (True, False), strict=True):
            group["lazy"] = lazy  # of a number there are no rows
        opt = wrapping.make(make(groups, backend=one, state_dtype=storage.moment))
        for t in range(7):
            for i, p in enumerate(params):
                if (t + i) % 4 == 3:
                    p.grad = None
                else:
                    g = torch.empty_like(p, dtype=storage.grad).copy_(values(p.shape, 50 * t + i))
                    if g.dim() == 2:
                        g[:2] = 0
                    set_gradient(p, g)
            opt.step()
        assert {row.backend for row in opt.backend_report()} == {one}
        results.append(everything(opt))
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))


def test_lr_zero_changes_no_parameter(made: tuple[Callable[..., Any], Wrapping]) -> None:
    """And makes the state that a checkpoint needs, once a step is made."""
    make, wrapping = made
    opt = wrapping.make(make(some_params()))
    for group in opt.param_groups:
        group["lr"] = 0.0
    before = [p.detach().clone() for p in parameters(opt)]
    for t in range(2 * wrapping.period):
        train(opt, [t])
    assert all(torch.equal(p, q) for p, q in zip(parameters(opt), before, strict=True))
    assert opt.optimizer.state_dict()["state"].keys() == {0, 1, 2}


@every_wrapper
def test_states_of_16_bits_resume_in_fp32(wrapping: Wrapping) -> None:
    params = [torch.nn.Parameter(p.detach().to(BF16)) for p in some_params()]
    opt = wrapping.make(danlu.AdamW(params))
    for t in range(wrapping.period + 1):
        for i, p in enumerate(params):
            p.grad = values(p.shape, 10 * t + i, wild=False).to(BF16)
        opt.step()
    loaded = wrapping.make(danlu.AdamW([torch.nn.Parameter(p.detach().clone()) for p in params]))
    loaded.load_state_dict(through_a_file(opt.state_dict()))
    assert all_same(everything(loaded), everything(opt))


@every_wrapper
def test_a_later_step_of_zeros_counts(wrapping: Wrapping) -> None:
    """A first one with an lr and gradients of zero is how torch asks for state."""
    opt = wrapping.make(danlu.AdamW(some_params()))
    train(opt, range(wrapping.period))
    before = opt.state[parameters(opt)[0]]["step"].item()
    opt.param_groups[0]["lr"] = 0.0
    for _ in range(wrapping.period):
        give_gradients(parameters(opt), 0, 0.0)
        opt.step()
    assert opt.state[parameters(opt)[0]]["step"].item() == 2 * before


@pytest.mark.parametrize("wrap", [danlu.EMA, danlu.Lookahead])
def test_a_first_sparse_gradient_with_lr_zero_counts(wrap: Callable[[Any], Any]) -> None:
    p = torch.nn.Parameter(torch.ones(4, 2))
    opt = wrap(danlu.Lazy(danlu.AdamW([p], lr=0.0)))
    p.grad = torch.sparse_coo_tensor([[1]], torch.zeros(1, 2), (4, 2), check_invariants=False)
    opt.step()
    assert opt.state[p]["step"] == 1


@every_wrapper
def test_frozen_parameters_get_no_gradients_state(wrapping: Wrapping) -> None:
    """When a distributed checkpoint asks for state; slow weights and averages they have."""
    params = some_params(2)
    params[1].requires_grad_(False)
    opt = wrapping.make(danlu.AdamW(params))
    get_optimizer_state_dict(torch.nn.ParameterList(params), opt)
    keys = opt.state_dict()["state"].get(1, {}).keys()
    assert keys <= {"slow", "slow_step", "ema", "ema_step"}


@every_wrapper
def test_a_closure_is_called_at_a_first_step_with_lr_zero(wrapping: Wrapping) -> None:
    """Whatever gradients there were before."""
    opt = wrapping.make(torch.optim.SGD(some_params(), lr=0.0))
    give_gradients(parameters(opt), 0, 0.0)
    assert [opt.step(lambda: 7.0) for _ in range(2)] == [7.0, 7.0]


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
    opt._pass.run()
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
    opt._pass.run()
    assert (p._version > version) == (wrapping.id == "lookahead")


# what is innermost, and which wrappers refuse it in what words
INNERMOST: dict[str, tuple[Callable[..., Any], Collection[str], str]] = {
    "lion": (danlu.Lion, (), ""),
    "torch": (torch.optim.SGD, ("LayerAdaptation", "Lazy"), "optimizer must be a danlu optimizer, got torch"),
    "sums": (danlu.LAMB, ("LayerAdaptation", "Lazy"), "LAMB sums over tensors"),
    "accumulates": (
        functools.partial(danlu.Tiger, accumulation_steps=2),
        NESTED.keys() - {"LayerAdaptation"},
        "accumulation_steps must be 1 for an optimizer inside {}",
    ),
    "line search": (torch.optim.LBFGS, NESTED, "must be a danlu optimizer|{} takes no LBFGS"),
    "list": (list, NESTED, "optimizer must be a .*[oO]ptimizer, got .*list"),
}
ORDERS = [order for n in (1, 2, 3) for order in itertools.product(NESTED, repeat=n)]
ORDERS += itertools.permutations(NESTED)


def nest(opt: Any, order: Sequence[str]) -> Any:
    for wrap in order:
        opt = NESTED[wrap](opt)
    return opt


def refusal(name: str, order: Sequence[str]) -> str | None:
    """What is said to wrappers that are put around one after the other; None if they nest."""
    _, refused, words = INNERMOST[name]
    for i, outer in enumerate(order):
        for inner in reversed(order[:i]):
            if inner == outer:
                return f"^optimizer is wrapped in {outer} already$"
            if not in_order((inner, outer)):
                return rf"^{outer} goes inside {inner}, not around it: {inner}\({outer}\(optimizer\)\)$"
        if outer in refused:
            return words.format(outer)
    return None


@pytest.mark.parametrize("name", INNERMOST)
def test_every_order(name: str) -> None:
    """Works, or says which one is right."""
    make, *_ = INNERMOST[name]
    for order in ORDERS:
        opt = make(some_params(1))
        words = refusal(name, order)
        if words is None:
            opt = nest(opt, order)
            before = parameters(opt)[0].detach().clone()
            train(opt, range(2))
            assert not torch.equal(parameters(opt)[0], before), order
        else:
            with pytest.raises(TypeError, match=words):
                nest(opt, order)


DEEP = [order for n in (3, 4, 5) for order in itertools.permutations(NESTED, n) if in_order(order)]


@pytest.mark.parametrize("order", DEEP, ids="-".join)
def test_nested_as_in_plain_torch(order: tuple[str, ...]) -> None:
    """Three and more, in float64: the same after each call as an oracle that knows no nesting."""
    for mode in MODES if "Lazy" in order and "LayerAdaptation" not in order else ("params",):
        start = [p.detach().double() for p in some_params()]
        oracle = Nested([p.clone() for p in start], order, mode)
        hyper = dict(lr=nested.LR, betas=(nested.BETA1, nested.BETA2), eps=nested.EPS)
        adamw: Any = danlu.AdamW([torch.nn.Parameter(p) for p in start], weight_decay=nested.DECAY, **hyper)
        opt = adamw
        around = {}
        for wrap in order:
            around[wrap] = opt = NESTED[wrap](opt, mode=mode)
        for t in range(13):
            gradients = [values(p.shape, 100 * t + i, wild=False).double() for i, p in enumerate(start)]
            for p, g in zip(parameters(opt), gradients, strict=True):
                g[t // 3 % 4] = 0
                p.grad = g.clone()
            opt.step()
            oracle.call(gradients)
            held = [adamw.state.get(p, {}) for p in parameters(opt)]
            if not held[0]:
                continue
            saved = opt.state_dict()["state"]
            for i, (p, x) in enumerate(zip(parameters(opt), oracle.all, strict=True)):
                found = {"p": p.detach(), "m": held[i]["exp_avg"], "v": held[i]["exp_avg_sq"]}
                if "Lookahead" in order:
                    found["slow"] = saved[i]["slow"]
                for name, got in found.items():
                    assert normwise(got, getattr(x, name)) < 1e-12, (mode, t, name)
            if "EMA" in order:
                with around["EMA"].swap():
                    for p, want in zip(parameters(opt), oracle.averages(), strict=True):
                        assert normwise(p.detach(), want) < 1e-12, (mode, t)


def test_state_made_for_a_distributed_checkpoint(made: tuple[Callable[..., Any], Wrapping]) -> None:
    """Before the first step, by one with an lr and gradients of zero: it counts none, and moves nothing."""
    make, wrapping = made
    model, whole = torch.nn.ParameterList(some_params()), some_params()
    opt, expected = wrapping.make(make(model.parameters())), wrapping.make(make(whole))
    lrs = [group["lr"] for group in opt.param_groups]
    state = get_optimizer_state_dict(model, opt)["state"]
    train(expected, range(wrapping.period))
    assert {name: held.keys() for name, held in state.items()} == {
        str(i): held.keys() for i, held in expected.state_dict()["state"].items()
    }
    assert [group["lr"] for group in opt.param_groups] == lrs
    inner = opt
    while isinstance(inner, Wrapper):
        if isinstance(inner, danlu.EMA):
            with pytest.raises(RuntimeError, match="no average before the first step"), inner.swap():
                pass
        assert not inner.stepped
        inner = inner.optimizer
    with torch.no_grad():
        for ours, theirs in ((p, q) for p, q in zip(model, some_params(), strict=True)):
            ours.copy_(theirs.neg())  # a checkpoint of the model alone
        whole = [torch.nn.Parameter(p.neg()) for p in some_params()]
    expected = wrapping.make(make(whole))
    for o in (opt, expected):
        train(o, range(2 * wrapping.period))
    assert all_same(everything(opt), everything(expected))


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
