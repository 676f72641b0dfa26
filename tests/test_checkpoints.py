"""What is saved goes on to the same bits, in the dtypes that the optimizer declares."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import state_dict as dcp

import danlu
from cases import BF16, EACH_STATE, F16, F32, Case, set_gradient, values
from danlu.testing import same_bits
from training import all_same, copies, everything, give_gradients, parameters, some_params, train

every_case = pytest.mark.parametrize("case", EACH_STATE)

SETTINGS: dict[str, tuple[torch.dtype, torch.dtype | None]] = {  # of the parameters, of the first moment
    "fp32": (F32, None),
    "bf16": (BF16, None),
    "bf16, bf16 moment": (BF16, BF16),
    "fp16": (F16, None),
    "fp16, bf16 moment": (F16, BF16),
}


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


def stored(dtype: torch.dtype) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(p.detach().to(dtype)) for p in some_params()]


def go(opt: danlu.FusedOptimizer, steps: range) -> None:
    for t in steps:
        for i, p in enumerate(parameters(opt)):
            p.grad = values(p.shape, 100 * t + i, wild=False).to(p.dtype)
        opt.step()


def tensors(opt: danlu.FusedOptimizer) -> list[torch.Tensor]:
    """Parameters and states, these by name: what is made after loading comes last in a state."""
    return [t for p in parameters(opt) for t in (p, *(held for _, held in sorted(opt.state[p].items())))]


def successor(case: Case, opt: danlu.FusedOptimizer, **engine: Any) -> danlu.FusedOptimizer:
    """A new optimizer over parameters of the same values."""
    return case.make([torch.nn.Parameter(p.detach().clone()) for p in parameters(opt)], **engine)


@pytest.mark.pairs
@every_case
@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("started", [False, True], ids=["new", "after steps of its own"])
def test_saved_and_loaded_it_goes_on_to_the_same_bits(
    case: Case, setting: tuple[torch.dtype, torch.dtype | None], started: bool, backend: str
) -> None:
    """After 4 steps, which is in the middle of an accumulation."""
    dtype, moment = setting
    opt = case.make(stored(dtype), state_dtype=moment, backend=backend)
    go(opt, range(4))
    saved, new = through_a_file(opt.state_dict()), successor(case, opt, state_dtype=moment, backend=backend)
    if started:
        before = [p.detach().clone() for p in parameters(new)]
        go(new, range(20, 23))
        for p, value in zip(parameters(new), before, strict=True):
            p.data.copy_(value)
    new.load_state_dict(saved)
    assert all_same(everything(new), everything(opt))
    assert [t.dtype for t in everything(new)] == [t.dtype for t in everything(opt)]
    go(opt, range(4, 9))
    go(new, range(4, 9))
    assert all_same(everything(new), everything(opt))


@every_case
@pytest.mark.parametrize(("saved", "declared"), [(None, BF16), (BF16, None), (F16, F32)], ids=str)
def test_a_moment_is_loaded_in_the_declared_dtype(
    case: Case, saved: torch.dtype | None, declared: torch.dtype | None
) -> None:
    opt = case.make(stored(BF16), state_dtype=saved)
    go(opt, range(3))
    new = successor(case, opt, state_dtype=declared)
    new.load_state_dict(opt.state_dict())
    for p, q in zip(parameters(opt), parameters(new), strict=True):
        old, loaded = opt.state[p], new.state[q]
        for name in old:
            dtype = declared or F32 if name == "exp_avg" else F32
            assert loaded[name].dtype == dtype
            assert same_bits(loaded[name], old[name].to(dtype))


@every_case
def test_only_the_last_loading_counts(case: Case, backend: str) -> None:
    opt = case.make(some_params(), backend=backend)
    train(opt, range(1))
    early = through_a_file(opt.state_dict())
    train(opt, range(1, 4))
    new = successor(case, opt, backend=backend)
    for saved in (early, opt.state_dict(), early, opt.state_dict()):
        new.load_state_dict(through_a_file(saved))
    train(opt, range(4, 7))
    train(new, range(4, 7))
    assert all_same(everything(new), everything(opt))


@every_case
def test_loading_leaves_the_source_alone(case: Case) -> None:
    opt = case.make(some_params())
    train(opt, range(3))
    saved = opt.state_dict()
    kept = copy.deepcopy(saved)
    new = successor(case, opt)
    new.load_state_dict(saved)
    assert str(saved) == str(kept)
    steps = [held["step"] for held in new.state.values()]
    assert len({step.data_ptr() for step in steps}) == len(steps)
    assert not {step.data_ptr() for step in steps} & {s["step"].data_ptr() for s in opt.state.values()}


@pytest.mark.parametrize("kind", [int, float, lambda n: torch.tensor(n), lambda n: torch.tensor([float(n)])])
def test_steps_of_other_kinds(kind: Any, backend: str) -> None:
    """As older versions of torch, other libraries and shared tensors had them."""
    opt = danlu.AdamW(some_params(), backend=backend)
    train(opt, range(3))
    saved, shared = copy.deepcopy(opt.state_dict()), kind(3)
    for held in saved["state"].values():
        held["step"] = shared
    new = successor(Case("adamw", danlu.AdamW), opt, backend=backend)
    new.load_state_dict(saved)
    train(opt, range(3, 6))
    train(new, range(3, 6))
    assert all_same(everything(new), everything(opt))


@pytest.mark.parametrize("name", ["AdamW", "Adam"])
@pytest.mark.parametrize("options", [dict(fused=True), dict(foreach=True), dict(foreach=False)], ids=str)
def test_state_of_torch(name: str, options: dict[str, bool], backend: str) -> None:
    hyper = dict(lr=3e-3, betas=(0.8, 0.95), weight_decay=0.1)
    theirs = getattr(torch.optim, name)(some_params(), **hyper, **options)
    train(theirs, range(3))
    ours = getattr(danlu, name)([p.detach().clone().requires_grad_() for p in parameters(theirs)])
    ours.backend = danlu.backends.resolve(backend, None)
    ours.load_state_dict(through_a_file(theirs.state_dict()))
    assert ours.param_groups[0]["betas"] == (0.8, 0.95)
    train(theirs, range(3, 8))
    train(ours, range(3, 8))
    for a, b in zip(everything(ours), everything(theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["AdamW", "Adam"])
def test_amsgrad_is_refused(name: str) -> None:
    theirs = getattr(torch.optim, name)(some_params(), amsgrad=True)
    train(theirs, range(2))
    ours = getattr(danlu, name)(some_params())
    train(ours, range(2))
    before = copies(ours)
    with pytest.raises(ValueError, match="amsgrad"):
        ours.load_state_dict(theirs.state_dict())
    assert all_same(everything(ours), before)
    train(ours, range(2, 3))


def test_older_checkpoints_without_newer_keys() -> None:
    opt = danlu.AdaX(some_params(), lr=0.25)
    train(opt, range(2))
    saved = opt.state_dict()
    for name in ("eps_mode", "maximize"):
        del saved["param_groups"][0][name]
    new = danlu.AdaX(some_params(), eps_mode="hat")
    new.load_state_dict(saved)
    assert (new.param_groups[0]["eps_mode"], new.param_groups[0]["maximize"]) == ("hat", False)
    assert new.param_groups[0]["lr"] == 0.25
    train(new, range(1))


def test_accumulation_may_begin_at_a_checkpoint(backend: str) -> None:
    """Saved without it: `micro_step` starts at zero."""
    opt = danlu.Tiger(some_params(), backend=backend)
    train(opt, range(2))
    new = danlu.Tiger(some_params(), accumulation_steps=2, backend=backend)
    saved = opt.state_dict()
    saved["param_groups"][0]["accumulation_steps"] = 2
    new.load_state_dict(saved)
    train(new, range(4))
    assert {held["step"].item() for held in new.state.values()} == {4}


def test_a_checkpoint_without_its_micro_step_begins_a_cycle(backend: str) -> None:
    opt = danlu.Tiger(some_params(), accumulation_steps=3, backend=backend)
    train(opt, range(6))
    saved = copy.deepcopy(opt.state_dict())
    for held in saved["state"].values():
        assert held.pop("micro_step") == 0
    new = successor(Case("tiger", danlu.Tiger), opt, backend=backend)
    new.load_state_dict(saved)
    train(opt, range(6, 11))
    train(new, range(6, 11))
    assert all_same(tensors(new), tensors(opt))


@every_case
def test_settings_that_cannot_be_used_are_refused(case: Case, backend: str) -> None:
    opt = case.make(some_params(), backend=backend)
    train(opt, range(2))
    before, settings = copies(opt), copy.deepcopy(opt.param_groups[0]["lr"])
    saved = copy.deepcopy(opt.state_dict())
    saved["param_groups"][0].update(lr=-1.0)
    for held in saved["state"].values():
        for value in held.values():
            value.fill_(7)
    with pytest.raises(ValueError, match="lr must be finite and at least 0, got -1"):
        opt.load_state_dict(saved)
    assert all_same(everything(opt), before)
    assert opt.param_groups[0]["lr"] == settings
    train(opt, range(2, 4))


def test_other_groups_are_refused_as_torch_does() -> None:
    opt, other = danlu.Lion(some_params()), danlu.Lion([{"params": some_params()}, {"params": some_params()}])
    train(opt, range(2))
    before = copies(opt)
    with pytest.raises(ValueError, match="different number of parameter groups"):
        opt.load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match="doesn't match the size"):
        opt.load_state_dict(danlu.Lion(some_params(2)).state_dict())
    assert all_same(everything(opt), before)
    opt.load_state_dict(opt.state_dict())
    train(opt, range(2, 3))


@every_case
def test_a_group_added_after_loading(case: Case, backend: str) -> None:
    opt = case.make(some_params(), backend=backend)
    train(opt, range(2))
    new = successor(case, opt, backend=backend)
    new.load_state_dict(through_a_file(opt.state_dict()))
    for o in (opt, new):
        o.add_param_group({"params": [torch.nn.Parameter(values((5,), 9, wild=False))], "lr": 1e-2})
        train(o, range(2, 6))
    assert all_same(everything(new), everything(opt))


def test_hooks_see_and_change_what_is_saved_and_loaded() -> None:
    """With bf16 parameters, to whose dtype torch would cast what a hook puts in."""
    opt = danlu.AdamW(stored(BF16))
    go(opt, range(2))
    ready = []
    opt.register_state_dict_pre_hook(ready.append)
    opt.register_state_dict_post_hook(lambda _, saved: {**saved, "extra": 1})
    saved = opt.state_dict()
    assert ready == [opt]
    assert saved["extra"] == 1
    new, seen = danlu.AdamW(stored(BF16)), []
    doubled = {p: {k: 2 * v for k, v in held.items()} for p, held in saved["state"].items()}
    new.register_load_state_dict_pre_hook(lambda _, loaded: {**loaded, "state": doubled})
    new.register_load_state_dict_post_hook(lambda o: seen.append(o.state[parameters(o)[0]]["step"].item()))
    new.load_state_dict(saved)
    assert seen == [4]
    for p, q in zip(parameters(opt), parameters(new), strict=True):
        assert same_bits(new.state[q]["exp_avg"], 2 * opt.state[p]["exp_avg"])


def test_what_a_hook_puts_in_is_checked() -> None:
    opt = danlu.Lion(some_params())
    bad = {**opt.state_dict(), "param_groups": [{**opt.state_dict()["param_groups"][0], "lr": -1.0}]}
    opt.register_load_state_dict_pre_hook(lambda *_: bad)
    with pytest.raises(ValueError, match="lr must be finite"):
        opt.load_state_dict(opt.state_dict())
    assert opt.param_groups[0]["lr"] > 0


def test_what_users_keep_in_the_state_survives() -> None:
    opt = danlu.Lion(some_params())
    train(opt, range(2))
    for p in parameters(opt):
        opt.state[p]["sharpness"] = torch.arange(3)
        opt.state[p]["name"] = "weight"
    new = danlu.Lion(some_params())
    new.load_state_dict(through_a_file(opt.state_dict()))
    train(new, range(2, 4))
    for held in new.state.values():
        assert held["sharpness"].dtype == torch.int64
        assert held["name"] == "weight"


@every_case
def test_a_step_with_lr_zero_makes_all_state(case: Case, backend: str) -> None:
    """So distributed checkpoints learn what there is to load; no parameter moves."""
    opt, other = (case.make(some_params(), lr=lr, backend=backend) for lr in (0.0, 1e-3))
    start = copies(opt)
    train(opt, range(1))
    train(other, range(1))
    assert all_same([p.detach() for p in parameters(opt)], start)
    assert [list(held) for held in opt.state.values()] == [list(held) for held in other.state.values()]
    assert len(opt.state) == len(parameters(opt))


@every_case
def test_distributed_state_dicts_in_one_process(case: Case, backend: str) -> None:
    """They are read and written under the parameters' names; loading makes a step with lr 0."""

    def model() -> torch.nn.Module:
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2, bias=False))

    first, second = model(), model()
    opt, new = (case.make(m.parameters(), backend=backend) for m in (first, second))
    train(opt, range(4))
    saved = copy.deepcopy(dcp.get_optimizer_state_dict(first, opt))
    assert set(saved["state"]) == {"0.weight", "0.bias", "1.weight"}
    second.load_state_dict(first.state_dict())
    dcp.set_optimizer_state_dict(second, new, saved)
    assert all_same(everything(new), everything(opt))
    train(opt, range(4, 9))
    train(new, range(4, 9))
    assert all_same(everything(new), everything(opt))


@every_case
def test_state_follows_the_strides_of_its_parameter(case: Case) -> None:
    """Saved contiguous, say; the next step plans for what it finds."""
    p = torch.nn.Parameter(values((6, 5), 0, wild=False).t())
    opt = case.make([p])
    give_gradients([p], 0)
    assert p.grad is not None
    p.grad = p.grad.t().contiguous().t()
    opt.step()
    saved = copy.deepcopy(opt.state_dict())
    held = saved["state"][0]
    held.update({name: value.contiguous() for name, value in held.items()})
    q = torch.nn.Parameter(p.detach().clone(memory_format=torch.preserve_format))
    new = case.make([q])
    new.load_state_dict(saved)
    for _ in range(2):
        for r in (p, q):
            set_gradient(r, values((6, 5), 1, wild=False).t())
        opt.step()
        new.step()
    assert all(map(case.agrees, everything(new), everything(opt)))
