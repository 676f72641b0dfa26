"""A wrapper's state and groups, as frameworks read and assign them."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

import danlu
from training import all_same, copies, give_gradients, parameters, some_params, train
from wrapped import WRAPPERS, Wrapping

every_wrapper = pytest.mark.parametrize("wrapping", WRAPPERS, ids=lambda w: w.id)
INNER: dict[str, Callable[[Any], Any]] = {
    "danlu": lambda params: danlu.AdamW(params, lr=0.1),
    "tiger": lambda params: danlu.Tiger(params, lr=0.1),
    "torch-sgd": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    "torch-dampened": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, dampening=0.5),
    "torch-plain-sgd": lambda params: torch.optim.SGD(params, lr=0.1),
    "torch-adam": lambda params: torch.optim.Adam(params, lr=0.1, weight_decay=0.1),
    "torch-nadam": lambda params: torch.optim.NAdam(params, lr=0.1, weight_decay=0.1),
    "torch-rmsprop": lambda params: torch.optim.RMSprop(params, lr=0.1, weight_decay=0.1, momentum=0.5),
}
every_inner = pytest.mark.parametrize("inner", INNER)


def saved(opt: Any) -> list[torch.Tensor]:
    """Parameters and everything of the state_dict."""
    states = opt.state_dict()["state"]
    values = [states[i][key] for i in sorted(states) for key in sorted(states[i])]
    return [p.detach().clone() for p in parameters(opt)] + [x.clone() for x in values if x is not None]


FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


@every_wrapper
@every_inner
def test_flattened_checkpoints(wrapping: Wrapping, inner: str) -> None:
    """They are read by what `state` and `param_groups` show. Saved at every place of a cycle, the first one
    included, it goes on to the same bits, and being saved changes nothing.
    """
    make = INNER[inner]
    for steps in range(wrapping.period + 2):
        undisturbed = wrapping.make(make(some_params()))
        model, other = torch.nn.ParameterList(some_params()), torch.nn.ParameterList(some_params())
        opt, loaded = wrapping.make(make(model.parameters())), wrapping.make(make(other.parameters()))
        for o in (undisturbed, opt):
            train(o, range(steps))
        opt.zero_grad()
        flat = get_optimizer_state_dict(model, opt, options=FLAT)
        with torch.no_grad():
            for p, q in zip(other, model, strict=True):
                p.copy_(q)
        wanted = get_optimizer_state_dict(other, loaded, options=FLAT)
        if inner != "torch-plain-sgd" or steps == 0:  # which dampens nothing and keeps nothing
            assert wanted.keys() == flat.keys(), steps
        set_optimizer_state_dict(other, loaded, copy.deepcopy(flat), options=FLAT)
        if inner == "torch-dampened":  # a first step of it is told by there being no state: none is saved
            loaded = opt
        for o in {undisturbed, opt, loaded}:
            train(o, range(steps, steps + wrapping.period + 1))
        assert all_same(saved(opt), saved(undisturbed)), steps
        assert all_same(saved(loaded), saved(opt)), steps


@every_wrapper
@pytest.mark.parametrize("inner", ["danlu", "torch-sgd", "torch-adam"])
def test_groups_may_be_assigned_and_stepped_one_after_the_other(wrapping: Wrapping, inner: str) -> None:
    """As DeepSpeed does: a cycle counts steps, not groups."""
    make, opts = INNER[inner], []
    for _ in range(2):
        params = some_params(4)
        opts.append(
            wrapping.make(make([{"params": params[:1]}, {"params": params[1:3]}, {"params": params[3:]}]))
        )
    opt, whole = opts
    for t in range(2 * wrapping.period + 1):
        for o in opts:
            give_gradients(parameters(o), t)
        whole.step()
        groups = opt.param_groups
        for group in groups:
            opt.param_groups = [group]
            opt.step()
        opt.param_groups = groups
        assert opt.position == whole.position
        assert all_same(saved(opt), saved(whole)), t


@every_wrapper
def test_groups_without_the_wrappers_keys_may_be_assigned(wrapping: Wrapping) -> None:
    """Made anew by a trainer that knows an lr and no cycle: averages and places stay."""
    opts = [wrapping.make(danlu.AdamW(some_params(), lr=0.1)) for _ in range(2)]
    keys = danlu.AdamW(some_params()).param_groups[0].keys()
    for t in range(2 * wrapping.period + 1):
        for o in opts:
            train(o, [t])
        opts[0].param_groups = [{key: group[key] for key in keys} for group in opts[0].param_groups]
    assert all_same(saved(opts[0]), saved(opts[1]))
    assert opts[0].position == opts[1].position


@every_wrapper
@pytest.mark.parametrize("inner", ["danlu", "torch-adam"])
def test_state_may_be_assigned(wrapping: Wrapping, inner: str) -> None:
    """As a view of itself, as plain dicts with everything, as the optimizer's alone, and by __setstate__."""
    opt = wrapping.make(INNER[inner](some_params()))
    plain = copy.deepcopy(opt)
    for o in (opt, plain):
        train(o, range(wrapping.period + 1))
    assignments: list[Callable[[Any], Any]] = [
        lambda state: state,
        lambda state: {key: dict(value) for key, value in state.items()},
        lambda state: defaultdict(dict, {key: dict(value) for key, value in state.items()}),
    ]
    for t, change in enumerate(assignments):
        opt.state = change(opt.state)
        for o in (opt, plain):
            train(o, range(100 + t, 102 + t))
        assert all_same(saved(opt), saved(plain)), t
    opt.__setstate__({"state": dict(opt.state), "param_groups": opt.param_groups})
    for o in (opt, plain):
        train(o, range(9))
    assert all_same(saved(opt), saved(plain))
    opt.state = defaultdict(dict)
    assert not opt.state
    assert not opt.optimizer.state


@every_wrapper
def test_a_view_without_states_of_the_wrapper_may_be_assigned(wrapping: Wrapping) -> None:
    """The optimizer gets no view as its state."""
    opts = []
    for _ in range(2):
        inner = danlu.AdamW(some_params())
        train(inner, range(2))
        opts.append(wrapping.make(inner))
    opts[0].state = opts[0].state
    for o in opts:
        train(o, range(2, 3 + wrapping.period))
    assert all_same(saved(opts[0]), saved(opts[1]))


@every_wrapper
def test_a_checkpoint_of_the_optimizer_inside_holds_no_place_in_a_cycle(wrapping: Wrapping) -> None:
    """Though its groups say so: without the mean of two gradients the third is the first."""
    opt = wrapping.make(danlu.AdamW(some_params(), lr=0.1))
    train(opt, range(wrapping.period + 2))
    inner = opt
    while hasattr(inner, "optimizer"):
        inner = inner.optimizer
    opts = []
    for clean in (False, True):
        state_dict = copy.deepcopy(inner.state_dict())
        if clean:
            keys = danlu.AdamW(some_params()).state_dict()["param_groups"][0].keys()
            state_dict["param_groups"] = [{k: g[k] for k in keys} for g in state_dict["param_groups"]]
        opts.append(wrapping.make(danlu.AdamW(some_params(), lr=0.1)))
        opts[-1].load_state_dict(state_dict)
        train(opts[-1], range(20, 21 + wrapping.period))
    assert all_same(saved(opts[0]), saved(opts[1]))


@every_wrapper
def test_entries_are_read_and_written(wrapping: Wrapping) -> None:
    """As those of any optimizer: both the optimizer's states and the wrapper's."""
    opt = wrapping.make(danlu.AdamW(some_params(2)))
    train(opt, range(wrapping.period + 1))
    first, second = parameters(opt)
    entry = opt.state[first]
    expected = opt.state_dict()["state"][0]
    assert dict(entry).keys() == expected.keys()
    assert all(entry[name] is expected[name] for name in entry)
    assert len(opt.state) == 2
    assert set(opt.state) == {first, second}
    for name in list(entry):
        entry[name] = entry[name].clone()
        assert opt.state_dict()["state"][0][name] is entry[name]
        del entry[name]
        assert name not in entry
        assert name not in opt.state_dict()["state"].get(0, {})
        with pytest.raises(KeyError):
            entry[name]
    opt.state[second] = {"exp_avg": torch.zeros(4, 2)}
    assert list(opt.state[second]) == ["exp_avg"]
    assert opt.state_dict()["state"][1].keys() == {"exp_avg"}
    del opt.state[second]
    assert second not in opt.state
    assert 1 not in opt.state_dict()["state"]
    with pytest.raises(KeyError):
        del opt.state[second]


@every_wrapper
@pytest.mark.parametrize("inner", ["danlu", "torch-adam"])
def test_a_parameter_that_takes_anothers_place_with_its_states(wrapping: Wrapping, inner: str) -> None:
    """Rows removed, as Gaussian splatting prunes: as if they had never been there."""
    keep = torch.tensor([0, 2, 3])
    opt = wrapping.make(INNER[inner](some_params(1)))
    small = wrapping.make(INNER[inner]([torch.nn.Parameter(p.detach()[keep]) for p in some_params(1)]))
    steps = wrapping.period + 1
    gradients = [torch.randn(4, 1, generator=torch.Generator().manual_seed(t)) for t in range(2 * steps)]
    for g in gradients[:steps]:
        parameters(opt)[0].grad, parameters(small)[0].grad = g, g[keep]
        opt.step()
        small.step()
    (old,) = parameters(opt)
    new = torch.nn.Parameter(old.detach()[keep])
    stored = opt.state.get(old)
    for name, value in stored.items():
        if value.ndim:
            stored[name] = value[keep]
    del opt.state[old]
    opt.param_groups[0]["params"][0] = new
    opt.state[new] = stored
    for g in gradients[steps:]:
        new.grad, parameters(small)[0].grad = g[keep], g[keep]
        opt.step()
        small.step()
    assert all_same(saved(opt), saved(small))


@every_wrapper
def test_an_optimizer_loaded_past_its_wrapper(wrapping: Wrapping) -> None:
    """Begins anew, as if the checkpoint had been loaded by the wrapper."""
    alone = danlu.AdamW(some_params(), lr=0.1)
    train(alone, range(3))
    opts = [wrapping.make(danlu.AdamW(some_params(), lr=0.1)) for _ in range(2)]
    for o, loading in zip(opts, (opts[0], opts[1].optimizer), strict=True):
        train(o, range(wrapping.period + 1))
        while loading is not opts[0] and hasattr(loading, "optimizer"):
            loading = loading.optimizer
        loading.load_state_dict(copy.deepcopy(alone.state_dict()))
        train(o, range(20, 20 + 2 * wrapping.period))
    assert all_same(saved(opts[0]), saved(opts[1]))


@every_wrapper
def test_hooks_of_all_optimizers_see_those_of_the_user(wrapping: Wrapping) -> None:
    """Not the passes inside the wrappers."""
    opt = wrapping.make(danlu.Lion(some_params()))
    seen: list[Any] = []
    handles = [
        register_optimizer_step_pre_hook(lambda o, *_: seen.append(o)),
        register_optimizer_step_post_hook(lambda o, *_: seen.append(o)),
    ]
    try:
        train(opt, range(wrapping.period))
    finally:
        for handle in handles:
            handle.remove()
    users = []
    o = opt
    while o is not None:
        users.append(o)
        o = getattr(o, "optimizer", None)
    assert {id(o) for o in seen} == {id(o) for o in users}


@every_wrapper
@every_inner
def test_a_first_step_with_an_lr_and_gradients_of_zero_counts(wrapping: Wrapping, inner: str) -> None:
    """A warm-up from 0 whose first batch is masked; asked for state is a step only by who asks."""
    opts = []
    for zero in (0.0, 1e-30):
        opt = wrapping.make(INNER[inner](some_params()))
        for group in opt.param_groups:
            group["lr"] = 0.0
        give_gradients(parameters(opt), 0, zero)
        opt.step()
        for group in opt.param_groups:
            group["lr"] = 0.1
        moved = []
        for t in range(1, 3 * wrapping.period + 1):
            before = parameters(opt)[0].detach().clone()
            train(opt, [t])
            moved.append(not torch.equal(before, parameters(opt)[0]))
        opts.append((opt, moved))
    assert opts[0][1] == opts[1][1]
    if wrapping.id == "accumulation":
        assert opts[0][1] == [t % 3 == 2 for t in range(1, 10)]
    for a, b in zip(saved(opts[0][0]), saved(opts[1][0]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


class Standing(torch.optim.Optimizer):
    """Stands for another one, as accelerate's does, without torch's own attributes."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    param_groups = property(lambda self: self.optimizer.param_groups)
    state = property(lambda self: self.optimizer.state)
    defaults = property(lambda self: self.optimizer.defaults)

    def step(self, closure: Any = None) -> Any:
        return self.optimizer.step(closure)


@every_wrapper
@pytest.mark.parametrize("kind", ["stands for another", "has a step of its own"])
def test_optimizers_without_the_hooks_of_torch(wrapping: Wrapping, kind: str) -> None:
    """A step that returns was made."""
    opts = []
    for odd in (True, False):
        inner: Any = torch.optim.SGD(some_params(), lr=0.1)
        if odd and kind == "stands for another":
            inner = Standing(inner)
        elif odd:
            whole = type(inner).step.__wrapped__
            inner.step = lambda closure=None, inner=inner, whole=whole: whole(inner, closure)
        opts.append(wrapping.make(inner))
        train(opts[-1], range(2 * wrapping.period))
    assert all_same(list(parameters(opts[0])), list(parameters(opts[1])))
    assert opts[0].position == opts[1].position
    states = [[opt.state[p] for p in parameters(opt)] for opt in opts]
    assert all(all_same(list(a.values()), list(b.values())) for a, b in zip(*states, strict=True))


@every_wrapper
def test_groups_keep_their_places_in_the_cycle(wrapping: Wrapping) -> None:
    """One that was stepped more often than another, saved and loaded."""

    def made() -> Any:
        params = some_params(2)
        return wrapping.make(torch.optim.SGD([{"params": [p]} for p in params], lr=0.1))

    def go(opt: Any, turns: list[int]) -> None:
        groups = opt.param_groups
        for t, i in enumerate(turns):
            opt.param_groups = [groups[i]]
            train(opt, [t])
            opt.param_groups = groups

    opt, loaded = made(), made()
    go(opt, [0, 1, 0])
    loaded.load_state_dict(copy.deepcopy(opt.state_dict()))
    with torch.no_grad():
        for p, q in zip(parameters(loaded), parameters(opt), strict=True):
            p.copy_(q)
    for o in (opt, loaded):
        go(o, [1, 0, 1, 0, 1])
    assert all_same(saved(opt), saved(loaded))


@every_wrapper
def test_a_checkpoint_of_a_wrapper_loaded_before_it_is_around(wrapping: Wrapping) -> None:
    """The optimizer keeps keys that it does not know; the wrapper begins anew."""
    opt = wrapping.make(danlu.AdamW(some_params(), lr=0.1))
    train(opt, range(wrapping.period + 1))
    opt.eval()
    state_dict = copy.deepcopy(opt.state_dict())
    inner = danlu.AdamW(some_params(), lr=0.1)
    inner.load_state_dict(state_dict)
    late = wrapping.make(inner)
    for p in parameters(late):
        assert set(late.state[p]) == {"exp_avg", "exp_avg_sq", "step"}
    assert late.position == 0
    train(late, range(wrapping.period))
    assert str(late.state)


@every_wrapper
def test_a_count_that_counts_nothing(wrapping: Wrapping) -> None:
    opt = wrapping.make(danlu.Lion([("weight", p) for p in some_params(1)]))
    train(opt, range(wrapping.period + 1))
    (shown,) = (name for name, key in opt._pass.shown_names().items() if key == "step")
    for wrong in (float("nan"), -3.0, torch.tensor(float("inf"))):
        broken = copy.deepcopy(opt.state_dict())
        broken["state"][0][shown] = wrong
        with pytest.raises(ValueError, match=rf"^weight: state '{shown}' must be finite and at least 0"):
            opt.load_state_dict(broken)


@every_wrapper
def test_no_hook_is_left_behind(wrapping: Wrapping) -> None:
    opt = wrapping.make(danlu.Lion(some_params()))
    train(opt, range(3 * wrapping.period))
    while opt is not None:
        assert not opt._optimizer_step_post_hooks
        opt = getattr(opt, "optimizer", None)


ODD: dict[str, Callable[[], torch.Tensor]] = {
    "uint8": lambda: torch.zeros(3, dtype=torch.uint8),
    "bool": lambda: torch.zeros(3, dtype=torch.bool),
    "complex": lambda: torch.zeros(3, dtype=torch.complex64),
    "expanded": lambda: torch.zeros(1).expand(3),
    "meta": lambda: torch.zeros(3, device="meta"),
}


@every_wrapper
@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("inner", ["danlu", "torch-adam"])
def test_parameters_that_cannot_have_a_gradient_are_left_alone(
    wrapping: Wrapping, kind: str, inner: str
) -> None:
    """As those of quantized layers are."""
    odd = torch.nn.Parameter(ODD[kind](), requires_grad=False)
    opt = wrapping.make(INNER[inner]([*some_params(), odd]))
    plain = wrapping.make(INNER[inner](some_params()))
    opt.backend_report()
    for t in range(2 * wrapping.period):
        give_gradients(parameters(plain), t)
        give_gradients(parameters(opt)[:-1], t)
        opt.step()
        plain.step()
    opt.backend_report()
    opt.eval()
    opt.train()
    assert all_same(saved(opt)[:3], saved(plain)[:3])
    assert set(opt.state_dict()["state"]) == {0, 1, 2}
    loaded = wrapping.make(INNER[inner]([*some_params(), odd]))
    loaded.load_state_dict(copy.deepcopy(opt.state_dict()))


@pytest.mark.parametrize("wrap", [danlu.EMA, danlu.Lookahead])
def test_what_no_pass_can_take_is_refused_before_anything_moves(wrap: Any) -> None:
    params = [*some_params(1), torch.nn.Parameter(torch.zeros(3, dtype=torch.complex64))]
    opt = wrap(torch.optim.SGD(params, lr=0.1))
    before = copies(opt)
    for p in params:
        p.grad = torch.ones_like(p)
    for _ in range(2):
        with pytest.raises(TypeError, match=r"param_groups\[0\]\['params'\]\[1\]: the parameter has dtype"):
            opt.step()
        assert all_same(copies(opt), before)


@every_wrapper
def test_states_that_go_together(wrapping: Wrapping) -> None:
    """A checkpoint with a mean and no count of it would be taken for a new one."""
    opt = wrapping.make(danlu.Lion([("weight", p) for p in some_params(1)]))
    train(opt, range(wrapping.period + 1))
    before = copies(opt)
    for shown in opt._pass.shown_names():
        broken = copy.deepcopy(opt.state_dict())
        del broken["state"][0][shown]
        with pytest.raises(ValueError, match=rf"^weight: the state_dict has no '{shown}'"):
            opt.load_state_dict(broken)
        for wrong in (torch.ones(2), [1.0]):
            broken = copy.deepcopy(opt.state_dict())
            broken["state"][0][shown] = wrong
            with pytest.raises((TypeError, ValueError), match=rf"^weight: state '{shown}'"):
                opt.load_state_dict(broken)
        assert all_same(copies(opt), before)
