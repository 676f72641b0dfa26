"""What torch.optim and the tools around it promise holds for every optimizer."""

from __future__ import annotations

import copy
import gc
import pickle
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import danlu
from cases import BF16, EACH_STATE, F32, INTERPRETED, Case, set_gradient, values
from danlu.testing import same_bits
from training import all_same, copies, everything, give_gradients, parameters, some_params, train

every_case = pytest.mark.parametrize("case", EACH_STATE)


def some_model() -> torch.nn.Sequential:
    layers = torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)
    for i, p in enumerate(p for layer in layers for p in layer.parameters()):
        p.data = values(p.shape, i, wild=False)
    return torch.nn.Sequential(*layers)


@every_case
def test_construction_reads_no_data_and_makes_no_state(case: Case, backend: str) -> None:
    module = torch.nn.Linear(3, 2, device="meta")
    opt = case.make(module.parameters(), backend=backend)
    assert isinstance(opt, torch.optim.Optimizer)
    opt.step()  # nothing has a gradient
    assert not opt.state
    module.to_empty(device="cpu")
    opt.param_groups[0]["params"][:] = module.parameters()
    torch.nn.init.ones_(module.weight)
    module.weight.grad = torch.ones(2, 3)
    opt.step()
    assert list(opt.state) == [module.weight]
    assert not any("." in key for key in opt.state[module.weight])
    assert all(isinstance(value, torch.Tensor) for value in opt.state[module.weight].values())


@every_case
def test_repr_shows_the_settings(case: Case) -> None:
    text = repr(case.make(some_params()))
    around = "LayerAdaptation around " if case.adapted else ""
    assert text.startswith(f"{around}{case.optimizer.__name__} (\nParameter Group 0\n")
    assert all(f"{name}: {value}\n" in text for name, value in case.hyper.items())


@pytest.mark.parametrize("form", [list, tuple, iter, lambda ps: [{"params": ps[0]}, {"params": ps[1:]}]])
def test_parameters_come_in_any_form(form: Callable[[Any], Any], backend: str) -> None:
    opt = danlu.Lion(form(some_params()), backend=backend)
    want = danlu.Lion(some_params(), backend=backend)
    train(opt, range(2))
    train(want, range(2))
    assert all_same(everything(opt), everything(want))


def test_names_stay_with_their_parameters(backend: str) -> None:
    named = [(f"layer{i}", p) for i, p in enumerate(some_params())]
    opt = danlu.AdamW([{"params": named[:1]}], backend=backend)
    opt.add_param_group({"params": named[1:], "weight_decay": 0.0})
    assert opt.param_groups[1]["param_names"] == ["layer1", "layer2"]
    train(opt, range(1))
    named[2][1].grad = torch.sparse_coo_tensor([[0]], torch.ones(1, 3), (4, 3), check_invariants=True)
    with pytest.raises(TypeError, match=r"^layer2: "):
        opt.step()
    opt.zero_grad()
    assert [row.name for row in danlu.Lion(named).backend_report()] == ["layer0", "layer1", "layer2"]


def test_a_tied_parameter_is_refused_as_torch_does() -> None:
    a, b = some_params(2)
    with pytest.raises(ValueError, match="more than one parameter group"):
        danlu.Lion([{"params": [a]}, {"params": [b, a]}])
    with pytest.warns(UserWarning, match="duplicate parameters"):
        opt = danlu.Lion([a, a])
    train(opt, range(2))
    assert opt.state[a]["step"] == 2  # once a step
    with pytest.raises(ValueError, match="non-leaf"):
        danlu.Lion([a * 2])
    with pytest.raises(ValueError, match="empty parameter list"):
        danlu.Lion([])


@every_case
def test_foreach_and_fused_change_no_bit(case: Case) -> None:
    want = case.make(some_params(), backend="reference")
    train(want, range(3))
    for options in (dict(foreach=True), dict(foreach=False), dict(fused=True), dict(fused=False)):
        opt = case.make(some_params(), **options)
        train(opt, range(3))
        assert all(map(case.agrees, everything(opt), everything(want)))
        taken = {row.backend for row in opt.backend_report()}
        assert taken == {"reference" if options.get("fused") is False else "cpu"}


@every_case
def test_what_has_no_gradient_is_left_alone(case: Case, backend: str) -> None:
    frozen, unused, used = some_params()
    frozen.requires_grad_(False)
    scalar = torch.nn.Parameter(torch.tensor(2.0))
    opt = case.make([{"params": [frozen, unused, used]}, {"params": []}, {"params": scalar}], backend=backend)
    before = [frozen.clone(), unused.detach().clone()]
    for t in range(3):
        give_gradients((used, scalar), t)
        opt.step()
    assert all_same([frozen, unused], before)
    assert [p._version for p in (frozen, unused)] == [0, 0]
    assert set(opt.state) == {used, scalar}
    assert scalar != 2.0


@every_case
def test_each_group_has_its_own_settings(case: Case, backend: str) -> None:
    """Mixed dtypes, with and without decay: as one optimizer for each parameter."""
    dtypes = [(F32, F32), (F32, BF16), (BF16, BF16), (BF16, F32)]
    decay = "extra_l2" if case.optimizer is danlu.Amos else "weight_decay"
    settings: list[dict[str, Any]] = [{}, {decay: 0.0}, {"lr": 0.01, "maximize": True}]

    def make(i: int, j: int) -> torch.nn.Parameter:
        p = torch.nn.Parameter(values((6,), 10 * i + j, wild=False).to(dtypes[j][0]))
        set_gradient(p, values((6,), 50 + 10 * i + j, wild=False).to(dtypes[j][1]))
        return p

    groups = [{"params": [make(i, j) for j in range(4)], **setting} for i, setting in enumerate(settings)]
    engine = dict(state_dtype=F32)  # of the other formats CUDA has kernels for some
    together = case.make(groups, backend=backend, **engine)
    alone = [
        case.make([make(i, j)], backend="reference", **engine, **settings[i])
        for i in range(3)
        for j in range(4)
    ]
    for _ in range(4):
        together.step()
        for opt in alone:
            opt.step()
    assert all(map(case.agrees, everything(together), [t for opt in alone for t in everything(opt)]))
    assert {row.backend for row in together.backend_report()} == {backend}


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "lambda": lambda opt: torch.optim.lr_scheduler.LambdaLR(opt, lambda t: 1 / (t + 1)),
    "one cycle": lambda opt: torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=0.1, total_steps=10),
    "plateau": lambda opt: torch.optim.lr_scheduler.ReduceLROnPlateau(opt, factor=0.5, patience=0),
    "cosine": lambda opt: torch.optim.lr_scheduler.CosineAnnealingLR(opt, T_max=5),
}


@pytest.mark.parametrize("tensor", [False, True], ids=["float lr", "tensor lr"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_take_effect_at_the_next_step(name: str, tensor: bool, backend: str) -> None:
    p = torch.nn.Parameter(torch.zeros(1))
    lr = torch.tensor(0.25) if tensor else 0.25
    opt = danlu.Lion([p], lr=lr, weight_decay=0.0, backend=backend)
    scheduler = SCHEDULERS[name](opt)
    moved = []
    for _ in range(6):
        p.data.zero_()
        p.grad = -torch.ones(1)
        opt.step()
        assert same_bits(p, torch.tensor([float(opt.param_groups[0]["lr"])]))
        moved.append(p.item())
        scheduler.step(*([1.0] if name == "plateau" else []))
    assert len(set(moved)) > 3


@every_case
def test_a_tensor_lr_is_read_at_every_step(case: Case, backend: str) -> None:
    lr = torch.tensor([2.0**-8])
    by_tensor = case.make(some_params(), lr=lr, backend=backend)
    by_number = case.make(some_params(), lr=2.0**-8, backend=backend)
    for t in range(6):
        train(by_tensor, [t])
        train(by_number, [t])
        assert all_same(everything(by_tensor), everything(by_number))
        lr.mul_(0.75)  # in place
        by_number.param_groups[0]["lr"] *= 0.75
    by_tensor.param_groups[0]["lr"] = torch.tensor(0.5)
    by_number.param_groups[0]["lr"] = 0.5
    train(by_tensor, range(6, 9))
    train(by_number, range(6, 9))
    assert all_same(everything(by_tensor), everything(by_number))
    assert lr.item() == torch.tensor(2.0**-8 * 0.75**6).item()


@every_case
def test_with_lr_zero_state_moves_and_parameters_stay(case: Case, backend: str) -> None:
    opt = case.make(some_params(), lr=0.0, backend=backend)
    start = [p.detach().clone() for p in parameters(opt)]
    for t, special in enumerate((1.0, float("inf"), float("nan"))):
        give_gradients(parameters(opt), t)
        parameters(opt)[1].grad[0] = special  # 0 * inf is NaN
        opt.step()
    assert all_same(parameters(opt), start)
    for held in opt.state.values():
        assert any(value.any() for name, value in held.items() if name != "step")


def test_a_closure_is_called_with_gradients_enabled(backend: str) -> None:
    (p,) = some_params(1)
    opt = danlu.Lion([p], lr=0.5, weight_decay=0.0, backend=backend)
    start, seen = p.detach().clone(), []

    def closure() -> torch.Tensor:
        seen.append(torch.is_grad_enabled())
        opt.zero_grad()
        loss = (p * 3).sum()
        loss.backward()
        return loss

    with torch.no_grad():
        loss = opt.step(closure)
    assert seen == [True]
    assert same_bits(loss, (start * 3).sum())
    assert same_bits(p, start - 0.5)
    assert opt.step() is None


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(set_to_none: bool, backend: str) -> None:
    opt = danlu.AdamW(some_params(), backend=backend)
    train(opt, range(2))
    opt.zero_grad(set_to_none=set_to_none)
    assert all((p.grad is None) if set_to_none else not p.grad.any() for p in parameters(opt))
    opt.step()
    assert all(held["step"] == (2 if set_to_none else 3) for held in opt.state.values())


def test_hooks_run_around_the_step(backend: str) -> None:
    opt = danlu.Lion(some_params(), backend=backend)
    seen: list[Any] = []
    opt.register_step_pre_hook(lambda o, args, kwargs: seen.append(("before", len(o.state))))
    handle = opt.register_step_post_hook(lambda o, args, kwargs: seen.append(("after", len(o.state))))
    train(opt, range(1))
    handle.remove()
    train(opt, range(1))
    assert seen == [("before", 0), ("after", 3), ("before", 3)]


def in_a_thread(step: Callable[[], Any]) -> None:
    thread = threading.Thread(target=step)
    thread.start()
    thread.join()


def in_mode(mode: Callable[[], Any]) -> Callable[[Callable[[], Any]], None]:
    def call(step: Callable[[], Any]) -> None:
        with mode():
            step()

    return call


CALLERS: dict[str, Callable[[Callable[[], Any]], None]] = {
    "thread": in_a_thread,
    "no_grad": in_mode(torch.no_grad),
    "enable_grad": in_mode(torch.enable_grad),
    "inference_mode": in_mode(torch.inference_mode),
    "another default device": in_mode(lambda: torch.device("meta")),
}


@pytest.mark.pairs
@pytest.mark.parametrize("name", CALLERS)
@every_case
def test_step_does_not_depend_on_its_caller(case: Case, name: str, backend: str) -> None:
    got, want = (case.make(some_params(), backend=backend) for _ in range(2))
    train(want, range(4))
    for t in range(4):
        give_gradients(parameters(got), t)
        CALLERS[name](got.step)
    assert all_same(everything(got), everything(want))
    assert not any(p.grad_fn for p in parameters(got))


@every_case
def test_autograd_notices_a_step(case: Case, backend: str) -> None:
    stepped, idle = some_params(2)
    opt = case.make([stepped, idle], backend=backend)
    train(opt, range(1))
    for t in range(1, 6):  # among them an update of every rule
        idle.grad = None
        versions, before = (stepped._version, idle._version), stepped.detach().clone()
        saved, unchanged = (stepped * stepped).sum(), (idle * idle).sum()
        give_gradients([stepped], t)
        assert stepped.grad is not None
        gradient_version, gradient = stepped.grad._version, stepped.grad.clone()
        opt.step()
        assert same_bits(stepped.grad, gradient)
        assert stepped.grad._version == gradient_version
        assert idle._version == versions[1]
        unchanged.backward()
        if not same_bits(stepped, before):
            assert stepped._version > versions[0]
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                saved.backward()


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda x: pickle.loads(pickle.dumps(x)),
}


@pytest.mark.pairs
@every_case
@pytest.mark.parametrize("started", [0, 2], ids=["before the first step", "after some"])
@pytest.mark.parametrize("how", COPIES)
def test_a_copy_goes_on_alone_to_the_same_bits(how: str, started: int, case: Case, backend: str) -> None:
    options: dict[str, Any] = dict(backend=backend, state_dtype=BF16, max_grad_norm=0.5)
    module = some_model()
    opt = case.make(module.parameters(), **options)
    train(opt, range(started))
    before = copies(opt)
    other_module, other = COPIES[how]((module, opt))
    assert type(other) is type(opt)
    assert all(p is q for p, q in zip(parameters(other), other_module.parameters(), strict=True))
    train(other, range(started, 5))
    assert all_same(everything(opt), before)
    train(opt, range(started, 5))
    assert all_same(everything(opt), everything(other))
    assert [row.backend for row in other.backend_report()] == [backend] * 4


@pytest.mark.parametrize("what", ["training step", "step itself"])
def test_a_compiled_step_is_a_graph_break_and_sees_a_new_lr(what: str, backend: str) -> None:
    torch._dynamo.reset()
    counter, x = CompileCounter(), values((8, 3), 5, wild=False)

    def run(compiled: bool) -> tuple[list[torch.Tensor], list[int]]:
        module = some_model()
        opt = danlu.AdamW(module.parameters(), backend=backend)

        def training_step(x: torch.Tensor) -> None:
            module(x).square().sum().backward()
            step()
            opt.zero_grad()

        step, whole = opt.step, training_step
        if compiled and what == "step itself":
            step = torch.compile(opt.step, backend=counter)
        elif compiled:
            whole = torch.compile(training_step, backend=counter)
        frames = []
        for t in range(5):
            opt.param_groups[0]["lr"] = 0.01 / (t + 1)
            whole(x)
            frames.append(counter.frame_count)
        return everything(opt), frames

    want, _ = run(compiled=False)
    got, frames = run(compiled=True)
    torch._dynamo.reset()
    assert all_same(got, want)
    assert (what == "step itself") or frames[0] > 0
    assert frames[1:] == frames[1:2] * 4


def test_an_optimizer_and_its_model_can_be_collected(backend: str) -> None:
    module = some_model()
    opt = danlu.AdamW(module.parameters(), backend=backend)
    train(opt, range(2))
    refs = [weakref.ref(x) for x in (module, opt, module[0].weight, opt.state[module[0].weight]["exp_avg"])]
    del module, opt
    gc.collect()
    assert [ref() for ref in refs] == [None] * 4


@pytest.mark.parametrize("fails", [False, True], ids=["good step", "failing step"])
def test_a_gradient_is_not_kept_alive(fails: bool, backend: str) -> None:
    opt = danlu.AdamW(some_params(), backend=backend, max_grad_norm=1.0)
    for t in range(3):
        give_gradients(parameters(opt), t)
        refs = [weakref.ref(p.grad) for p in parameters(opt) if p.grad is not None]
        opt.grad_scale = "bad" if fails and t == 2 else None  # type: ignore[attr-defined]
        if fails and t == 2:
            with pytest.raises(ValueError, match="bad"):
                opt.step()
        else:
            opt.step()
        opt.zero_grad()
        assert [ref() for ref in refs] == [None] * 3


def test_nothing_piles_up_over_steps(backend: str) -> None:
    opt = danlu.AdamW(some_params(), backend=backend, max_grad_norm=1.0)
    steps = 25 if INTERPRETED else 100

    def counts() -> tuple[int, int]:
        gc.collect()
        return len(gc.get_objects()), sys.getallocatedblocks()

    train(opt, range(steps))
    objects, blocks = counts()
    for _ in range(2):  # the same numbers: what makes them keeps them
        train(opt, range(steps))
    more_objects, more_blocks = counts()
    assert more_objects - objects < 20
    assert more_blocks - blocks < 2 * steps  # less than one a step; torch's own caches still grow a little
