"""Parameters that step by themselves: the bits of a step of all, and no look at any other parameter."""

from __future__ import annotations

import gc
import sys
import threading
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import pytest
import torch

import danlu
from cases import ALL, Case, values
from danlu import part as parts_module
from danlu import scale as step_scale
from danlu.backends.gpu import GpuExecutor
from danlu.part import Part
from danlu.plan import Plan
from training import all_same, copies, everything, give_gradients, parameters, some_params

MADE = [c for c in ALL if c.id in ("lion", "tiger-accumulate", "adafactor-momentum", "lamb", "layer-adamw")]
every_case = pytest.mark.parametrize("case", MADE, ids=lambda c: c.id)
ADAMW = next(case for case in ALL if case.id == "adamw")
Optimizer = danlu.FusedOptimizer


def two_groups(case: Case, backend: str, count: int = 5, **engine: Any) -> Optimizer:
    params = some_params(count)
    return case.make([{"params": params[:2]}, {"params": params[2:], "lr": 7e-3}], backend=backend, **engine)


def singles(opt: Optimizer) -> list[Part]:
    return [Part(opt, [p]) for p in parameters(opt)]


def step_all(parts: Iterable[Part]) -> None:
    for part in parts:
        part.step()


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> list[Plan]:
    """Those that are made for parts."""
    made: list[Plan] = []

    class Noted(Plan):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr(parts_module, "Plan", Noted)
    return made


# The same bits.


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1, 1), (3, 2), (5,)], ids=str)
@every_case
def test_parts_give_the_bits_of_the_whole(case: Case, sizes: Sequence[int], backend: str) -> None:
    opt, want = two_groups(case, backend), two_groups(case, backend)
    params = parameters(opt)[::-1]
    parts = [Part(opt, [params.pop() for _ in range(size)][::-1]) for size in sizes]
    for t in range(5):
        for made in (opt, want):
            give_gradients(parameters(made), t)
            parameters(made)[t].grad = None
            made.param_groups[1]["lr"] = 7e-3 / (t + 1)
        step_all(parts[:: (-1) ** t])
        want.step()
    assert all_same(everything(opt), everything(want))


@pytest.mark.parametrize("mode", ["rows", "params"])
def test_parts_of_a_lazy_optimizer(mode: str, backend: str) -> None:
    made = [danlu.Lazy(two_groups(ADAMW, backend), mode=mode) for _ in range(2)]
    parts = singles(made[0])
    for t in range(3):
        for opt in made:
            give_gradients(parameters(opt), t)
            for p in parameters(opt):
                p.grad[t] = 0  # type: ignore[index]
        step_all(parts)
        made[1].step()
    assert all_same(*(everything(opt) for opt in made))


def test_parts_and_the_whole_in_turn(backend: str, plans: list[Plan]) -> None:
    opt, want = two_groups(ADAMW, backend), two_groups(ADAMW, backend)
    parts, whole = singles(opt), set()
    for t in range(6):
        for made in (opt, want):
            give_gradients(parameters(made), t)
        step_all(parts) if t % 2 else opt.step()
        want.step()
        whole.add(opt._plan)
    assert all_same(everything(opt), everything(want))
    assert len(plans) == len(parts)
    assert len(whole) == 1


def test_hooks_of_a_backward_inside_a_closure(backend: str) -> None:
    """Each parameter steps when its gradient is there, and its gradient is gone before the next one is."""
    models = [torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    made = [ADAMW.make(model.named_parameters(), backend=backend) for model in models]
    most = 0

    def release(p: torch.Tensor) -> None:
        nonlocal most
        most = max(most, sum(q.grad is not None for q in models[0].parameters()))
        by_parameter[p].step()
        p.grad = None

    by_parameter = {p: Part(made[0], [p]) for p in models[0].parameters()}
    for p in models[0].parameters():
        p.register_post_accumulate_grad_hook(release)
    for t in range(3):
        losses, x = [], values((5, 3), t, wild=False)
        for model, opt in zip(models, made, strict=True):

            def closure(model: torch.nn.Module = model, x: torch.Tensor = x) -> torch.Tensor:
                model.zero_grad()
                loss = model(x).square().sum()
                loss.backward()
                return loss.detach()

            losses.append(opt.step(closure))
        assert torch.equal(*losses)
    assert all_same(*(everything(opt) for opt in made))
    assert most == 1


def halves(m: torch.Tensor) -> list[torch.Tensor]:
    return [m[:72], m[24:], m]


@every_case
def test_parts_over_one_memory(case: Case, backend: str) -> None:
    """One after the other, as a step of all takes them; also within a part."""
    results = []
    for sizes in (None, (1, 1, 1), (1, 2), (-3,)):
        m = values((96, 40), 7, wild=False)
        params = [torch.nn.Parameter(view) for view in halves(m)]
        for i, p in enumerate(params):
            p.grad = values(p.shape, i, wild=False)
        opt = case.make(params, backend=backend)
        ends = iter(params)
        chosen = [([next(ends) for _ in range(abs(size))], size) for size in sizes or ()]
        parts = [Part(opt, some if size > 0 else some[::-1]) for some, size in chosen]
        for _ in range(2):
            step_all(parts) if parts else opt.step()
        results.append(m)
    assert all_same(results[:1] * 3, results[1:])


@every_case
def test_a_state_dict_loaded_between(case: Case, backend: str) -> None:
    opt, want = two_groups(case, backend), two_groups(case, backend)
    parts, saved = singles(opt), {}
    for t in range(6):
        for made in (opt, want):
            give_gradients(parameters(made), t)
            if t == 2:
                saved[made] = copies(made), made.state_dict()
            if t == 4:
                made.load_state_dict(saved[made][1])
        step_all(parts)
        want.step()
    assert all_same(everything(opt), everything(want))


# What around it sees.


def test_wrappers_around_show_states_and_count_once(backend: str) -> None:
    """The gradients are gone when the whole steps, whose own pass comes then."""
    made = [danlu.EMA(two_groups(ADAMW, backend), decay=0.9) for _ in range(2)]
    parts = singles(made[0].optimizer)
    for t in range(3):
        for opt in made:
            give_gradients(parameters(opt), t)
        step_all(parts)
        for p in parameters(made[0]):
            assert made[0].state[p]["step"] == t + 1
            p.grad = None
        for opt in made:
            opt.step()
    assert all_same(*(everything(opt) for opt in made))
    for p, q in zip(*map(parameters, made), strict=True):
        assert torch.equal(made[0].state[p]["ema"], made[1].state[q]["ema"])


def test_parts_of_a_wrappers_own_pass(backend: str) -> None:
    made = [danlu.EMA(two_groups(ADAMW, backend), decay=0.9) for _ in range(2)]
    passes = singles(made[0]._pass)
    for t in range(3):
        for opt in made:
            give_gradients(parameters(opt), t)
            opt._pass.start()
            opt.optimizer.step()
        step_all(passes)
        made[1]._pass.run()
    for p, q in zip(*map(parameters, made), strict=True):
        assert torch.equal(made[0].state[p]["ema"], made[1].state[q]["ema"])
        assert made[0].state[p]["ema_step"] == 3


def test_it_is_no_step_of_the_optimizer(backend: str) -> None:
    opt = two_groups(ADAMW, backend)
    calls: list[str] = []
    opt.register_step_pre_hook(lambda *_: calls.append("pre"))
    opt.register_step_post_hook(lambda *_: calls.append("post"))
    give_gradients(parameters(opt), 0)
    step_all(singles(opt))
    assert not calls
    assert opt._plan is None
    assert [held["step"].item() for held in opt.state.values()] == [1.0] * 5


def test_a_parameter_given_twice_steps_once(backend: str) -> None:
    opt = two_groups(ADAMW, backend)
    give_gradients(parameters(opt), 0)
    (p, *_) = parameters(opt)
    Part(opt, [p, p]).step()
    assert opt.state[p]["step"] == 1


def test_a_gradient_that_is_not_finite_skips_the_part(backend: str) -> None:
    opt = two_groups(ADAMW, backend)
    parts = singles(opt)
    give_gradients(parameters(opt), 0)
    step_all(parts)
    before = copies(opt)
    opt.found_inf = torch.tensor(1.0)  # type: ignore[attr-defined]
    step_all(parts)
    assert all_same(everything(opt), before)


def test_a_part_waits_for_the_lock() -> None:
    opt = two_groups(ADAMW, "reference")
    give_gradients(parameters(opt), 0)
    (part, *_) = singles(opt)
    worker = threading.Thread(target=part.step)
    with opt._lock:
        worker.start()
        worker.join(timeout=0.1)
        assert worker.is_alive()
    worker.join(timeout=60)
    assert opt.state[parameters(opt)[0]]["step"] == 1


def test_an_lr_on_a_device_moves_the_counters_of_its_part(
    cuda: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    opt, want = two_groups(ADAMW, "cuda"), two_groups(ADAMW, "cuda")
    parts = singles(opt)
    for t in range(4):
        for made in (opt, want):
            give_gradients(parameters(made), t)
        if t == 2:
            opt.param_groups[1]["lr"] = torch.tensor(7e-3, dtype=torch.float64)
            monkeypatch.setattr(step_scale, "is_on_device", lambda value: isinstance(value, torch.Tensor))
        step_all(parts)
        want.step()
        assert opt.counters_on_device == (t >= 2)
    assert all_same(everything(opt), everything(want))
    plans = [part._plan for part in parts]
    assert not any(executor.reads_host for plan in plans if plan for executor in plan._executors)


def test_what_a_graph_has_captured_outlives_the_part(cuda: object, monkeypatch: pytest.MonkeyPatch) -> None:
    opt = two_groups(ADAMW, "cuda", capturable=True)
    give_gradients(parameters(opt), 0)
    captured, plain = (Part(opt, [p]) for p in parameters(opt)[:2])
    plain.step()
    with monkeypatch.context() as patch:
        patch.setattr(GpuExecutor, "is_capturing", lambda executor: True)
        captured.step()
        captured.step()
    assert len(opt._captured_plans) == 1
    refs = [weakref.ref(part._plan) for part in (captured, plain)]  # type: ignore[type-var]
    del captured, plain
    gc.collect()
    assert [ref() is None for ref in refs] == [False, True]


# When a plan is out of date.


def own_state(opt: Optimizer, p: torch.Tensor) -> None:
    opt.state[p]["exp_avg"] = opt.state[p]["exp_avg"].clone()


def own_states(opt: Optimizer, p: torch.Tensor) -> None:
    opt.state[p] = dict(opt.state[p])


def own_gradient(opt: Optimizer, p: torch.Tensor) -> None:
    p.grad = None
    p.grad_dtype = torch.bfloat16  # type: ignore[attr-defined]
    p.grad = values(p.shape, 3, wild=False).bfloat16()


def own_place(opt: Optimizer, p: torch.Tensor) -> None:
    """Into the other group, whose lr it takes up."""
    first, second = (group["params"] for group in opt.param_groups)
    assert first[-1] is p
    second.append(first.pop())


def places_exchanged(opt: Optimizer, p: torch.Tensor) -> None:
    """Where the other was; each takes up the other's lr."""
    first, second = (group["params"] for group in opt.param_groups)
    first[1], second[0] = second[0], first[1]


def own_data(opt: Optimizer, p: torch.Tensor) -> None:
    p.data = p.data.t().contiguous().t()


def every_state(opt: Optimizer, p: torch.Tensor) -> None:
    opt.state = defaultdict(dict, {q: dict(held) for q, held in opt.state.items()})


# and how many of 40 plans are made anew
CHANGES = [
    (own_state, 1),
    (own_states, 1),
    (own_gradient, 1),
    (own_place, 1),
    (places_exchanged, 2),
    (own_data, 1),
    (every_state, 40),
]


@pytest.mark.parametrize(("change", "count"), CHANGES)
def test_a_plan_goes_with_its_own_parameter_alone(
    change: Callable[[Optimizer, torch.Tensor], None], count: int, plans: list[Plan]
) -> None:
    made = [two_groups(ADAMW, "cpu", count=40) for _ in range(2)]
    parts = singles(made[0])
    for opt in made:
        give_gradients(parameters(opt), 0)
    for _ in range(2):
        step_all(parts)
        made[1].step()
    for opt in made:
        change(opt, parameters(opt)[1])
    del plans[:]
    step_all(parts)
    made[1].step()
    assert len(plans) == count
    assert all_same(*(everything(opt) for opt in made))


def test_hyper_parameters_are_read_at_every_step(backend: str, plans: list[Plan]) -> None:
    """Those that a plan depends on end the plans of their group alone."""
    case = next(case for case in ALL if case.id == "adax")
    opt, want = two_groups(case, backend), two_groups(case, backend)
    parts = singles(opt)
    changes: list[dict[str, Any]] = [{}, {"lr": 0.1}, {"weight_decay": 0.3}, {"eps_mode": "inside"}, {}]
    counts = []
    for t, change in enumerate(changes):
        for made in (opt, want):
            made.param_groups[1].update(change)
            give_gradients(parameters(made), t)
        step_all(parts)
        want.step()
        counts.append(len(plans))
    by_kernels = backend != "reference"
    assert counts == [5, 5, 5, 5 + 3 * by_kernels, 5 + 3 * by_kernels]
    assert all_same(everything(opt), everything(want))


def test_a_group_more_leaves_plans_alone(backend: str, plans: list[Plan]) -> None:
    opt = two_groups(ADAMW, backend)
    parts = singles(opt)
    for t in range(3):
        give_gradients(parameters(opt), t)
        step_all(parts)
        opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))]})
    assert len(plans) == len(parts)


# Errors.


def test_a_tensor_that_cannot_be_stepped_changes_nothing(backend: str) -> None:
    opt = two_groups(ADAMW, backend)
    part = Part(opt, parameters(opt)[1:4])
    give_gradients(parameters(opt), 0)
    part.step()
    before = copies(opt)
    parameters(opt)[3].grad = parameters(opt)[3].grad.to_sparse()  # type: ignore[union-attr]
    with pytest.raises(TypeError, match=r"param_groups\[1\]\['params'\]\[1\]: the gradient is sparse"):
        part.step()
    give_gradients(parameters(opt), 1)
    opt.param_groups[1]["betas"] = 1.0, 0.9
    with pytest.raises(ValueError, match=r"betas\[0\] must be in"):
        part.step()
    assert all_same(everything(opt), before)
    opt.param_groups[1]["betas"] = 0.9, 0.95
    part.step()
    assert [opt.state[p]["step"] for p in parameters(opt)[1:4]] == [2, 2, 2]


def test_a_parameter_that_has_left_is_named() -> None:
    opt = ADAMW.make([(name, torch.nn.Parameter(torch.ones(n))) for n, name in ((3, "a"), (2, "b"))])
    give_gradients(parameters(opt), 0)
    part = Part(opt, parameters(opt))
    part.step()
    before = copies(opt)
    opt.param_groups[0]["params"].pop()
    with pytest.raises(ValueError, match=r"^b: not a parameter of the optimizer \(shape \(2,\)\)"):
        part.step()
    assert all_same(everything(opt), before[:4])


def test_what_is_no_part_is_refused() -> None:
    opt = two_groups(ADAMW, "cpu")
    with pytest.raises(ValueError, match=r"parameters\[1\]: not a parameter of the optimizer"):
        Part(opt, [parameters(opt)[0], torch.nn.Parameter(torch.ones(4, 1))])
    with pytest.raises(TypeError, match="optimizer must be a danlu optimizer, got EMA"):
        Part(danlu.EMA(opt), parameters(opt))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_grad_norm needs all gradients"):
        Part(two_groups(ADAMW, "cpu", max_grad_norm=1.0), [])


# The others are not looked at.


class Watched(list[Any]):
    """Notes what reads more than an element."""

    walks = 0

    def __iter__(self) -> Iterator[Any]:
        type(self).walks += 1
        return super().__iter__()


def operations(work: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> tuple[int, list[int]]:
    """Calls from Python that some work makes, and the ids of the tensors that it hashes, in C++ too."""
    calls, hashed = 0, []

    def count(frame: object, event: str, argument: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    def noted(t: torch.Tensor) -> int:
        hashed.append(id(t))
        return id(t)

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "__hash__", noted)
        sys.setprofile(count)
        try:
            work()
        finally:
            sys.setprofile(None)
    return calls, hashed


@pytest.mark.parametrize("phase", ["first", "later"])
def test_a_step_visits_no_other_parameter(phase: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = []
    for others in (100, 3000):
        params = [torch.nn.Parameter(torch.ones(2)) for _ in range(others)]
        opt = ADAMW.make([{"params": params[:3]}, {"params": params[3:]}], backend=backend)
        opt.param_groups[1]["params"] = Watched(params[3:])
        give_gradients(params[:1], 0)
        for p in params[1:]:
            p.grad = torch.ones(2)
        opt.step()
        warm = Part(opt, [params[1]])
        monkeypatch.setattr(Watched, "walks", 0)
        part = Part(opt, [params[2], params[50]])
        assert Watched.walks == 0
        for one in (warm, part)[: 1 + (phase == "later")]:
            one.step()
        monkeypatch.setattr(Watched, "walks", 0)
        calls, hashed = operations(part.step, monkeypatch)
        assert set(hashed) == {id(params[2]), id(params[50])}
        assert Watched.walks == 0
        counts.append(calls)
    assert counts[0] == counts[1]
