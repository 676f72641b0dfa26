"""Whatever changes between two steps, the next one computes what an optimizer made anew would."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable

import pytest
import torch

import danlu
from cases import ALL, BACKENDS, BF16, F16, F32, Case, set_gradient, values
from danlu.part import Part
from danlu.testing import same_bits

STEPS = 6
SHAPES = [(3, 4), (5, 2), (), (7,)]
FROZEN = 3  # a parameter that never has a gradient
Tensors = list[torch.Tensor]
Change = Callable[[danlu.FusedOptimizer, int], Tensors | None]


@pytest.fixture(params=[*BACKENDS, f"{BACKENDS[0]}, tensors read by attributes"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if "attributes" in request.param:
        monkeypatch.setenv("DANLU_DLPACK", "0")
    if request.param == "cuda":
        request.getfixturevalue("cuda")
    return str(request.param).split(",")[0]


def parameters(opt: danlu.FusedOptimizer) -> list[torch.nn.Parameter]:
    return [p for group in opt.param_groups for p in group["params"]]


def parameter(shape: tuple[int, ...], seed: int) -> torch.nn.Parameter:
    p = torch.nn.Parameter(values(shape, seed, wild=False))
    p.grad = values(shape, seed + 100, wild=False)
    return p


def twin(p: torch.Tensor) -> torch.nn.Parameter:
    """A parameter of the same values and gradient that shares no memory with `p`."""
    q = torch.nn.Parameter(p.detach().clone(), requires_grad=p.requires_grad)
    if p.grad is not None:
        set_gradient(q, p.grad.detach().clone())
    return q


def made_anew(case: Case, opt: danlu.FusedOptimizer) -> danlu.FusedOptimizer:
    """The reference with copies of all that `opt` holds now."""
    groups = [{**group, "params": [twin(p) for p in group["params"]]} for group in opt.param_groups]
    new = case.make(groups, backend="reference")
    for p, q in zip(parameters(opt), parameters(new), strict=True):
        if p in opt.state:
            new.state[q] = {key: value.detach().clone() for key, value in opt.state[p].items()}
    return new


def assert_same(case: Case, opt: danlu.FusedOptimizer, want: danlu.FusedOptimizer) -> None:
    for p, q in zip(parameters(opt), parameters(want), strict=True):
        assert case.agrees(p.detach().resolve_neg(), q)
        assert opt.state.get(p, {}).keys() == want.state.get(q, {}).keys()
        for key, value in want.state.get(q, {}).items():
            assert case.agrees(opt.state[p][key], value), key


def gradient_dtype(opt: danlu.FusedOptimizer, t: int) -> None:
    for p in parameters(opt)[:FROZEN]:
        g, p.grad = p.grad, None  # torch changes grad_dtype only then
        assert g is not None
        p.grad_dtype = (F32, BF16, F16)[t % 3]  # type: ignore[attr-defined]
        p.grad = g.to(p.grad_dtype)  # type: ignore[attr-defined]


def gradient_strides(opt: danlu.FusedOptimizer, t: int) -> None:
    p = parameters(opt)[t % 2]
    assert p.grad is not None
    p.grad = p.grad.t().contiguous().t()


def gradient_negated(opt: danlu.FusedOptimizer, t: int) -> None:
    """Of the same address, dtype, shape and strides as an ordinary one."""
    p = parameters(opt)[0]
    assert p.grad is not None
    if t % 2:
        p.grad = torch._neg_view(-p.grad)


def gradient_negated_in_place(opt: danlu.FusedOptimizer, t: int) -> None:
    """Another tensor over the memory of the last step's gradient."""
    p = parameters(opt)[0]
    assert p.grad is not None
    memory = opt.param_groups[0].setdefault("memory", torch.empty(SHAPES[0]))
    memory.copy_(p.grad)
    p.grad = torch._neg_view(memory) if t % 2 else memory


def gradient_late(opt: danlu.FusedOptimizer, t: int) -> None:
    if t < 3:
        parameters(opt)[t % 2].grad = None


def gradient_first_late(opt: danlu.FusedOptimizer, t: int) -> None:
    if t < 3:
        parameters(opt)[1].grad = None


def gradients_alternate(opt: danlu.FusedOptimizer, t: int) -> None:
    for i, p in enumerate(parameters(opt)):
        if (i + t) % 2:
            p.grad = None


def no_gradients(opt: danlu.FusedOptimizer, t: int) -> None:
    if t in (0, 3):
        opt.zero_grad()


def parameter_data(opt: danlu.FusedOptimizer, t: int) -> Tensors:
    p = parameters(opt)[t % FROZEN]
    old, p.data = p.data, p.data.clone()
    return [old]


def parameter_set(opt: danlu.FusedOptimizer, t: int) -> Tensors:
    p = parameters(opt)[t % FROZEN]
    old = p.data
    with torch.no_grad():
        p.set_(old.clone())
    return [old]


def parameter_strides(opt: danlu.FusedOptimizer, t: int) -> Tensors:
    p = parameters(opt)[0]
    old = p.data
    p.data = old.t().contiguous().t() if t % 3 == 1 else old.contiguous()
    return [old] if t % 3 == 1 else []


def parameter_negated(opt: danlu.FusedOptimizer, t: int) -> None:
    p = parameters(opt)[0]
    p.data = torch._neg_view(-p.data) if t % 2 else p.data.resolve_neg()


def parameter_swapped(opt: danlu.FusedOptimizer, t: int) -> Tensors:
    p = parameters(opt)[0]
    g, p.grad = p.grad, None
    other = torch.nn.Parameter(p.detach() + 1)
    torch.utils.swap_tensors(p, other)
    p.grad = g
    return [other]


def module_dtype(opt: danlu.FusedOptimizer, t: int) -> None:
    torch.nn.ParameterList(parameters(opt)).to((F32, torch.float64, BF16)[t % 3])


def state_replaced(opt: danlu.FusedOptimizer, t: int) -> Tensors:
    old = []
    for held in list(opt.state.values())[t % 2 :]:
        old += held.values()
        held.update({key: value.clone() for key, value in held.items()})
    return old


def state_data(opt: danlu.FusedOptimizer, t: int) -> Tensors:
    old = []
    for held in opt.state.values():
        for value in held.values():
            old.append(value.data)
            value.data = value.data.clone()
    return old


def state_set(opt: danlu.FusedOptimizer, t: int) -> Tensors:
    old = []
    for held in opt.state.values():
        for value in held.values():
            old.append(value.data)
            value.set_(value.clone())
    return old


def state_dtype(opt: danlu.FusedOptimizer, t: int) -> Tensors:
    held = opt.state.get(parameters(opt)[0], {})
    old = [held["exp_avg"]] if "exp_avg" in held else []
    if old:
        held["exp_avg"] = held["exp_avg"].to((F32, BF16)[t % 2], copy=True)
    return old


def state_incomplete(opt: danlu.FusedOptimizer, t: int) -> Tensors:
    held = opt.state.get(parameters(opt)[0], {})
    return [held.pop(list(held)[t % len(held)])] if held else []


def step_of_shape_one(opt: danlu.FusedOptimizer, t: int) -> None:
    if t == 2:
        held = opt.state[parameters(opt)[0]]
        held["step"] = held["step"].reshape(1)


def step_number(opt: danlu.FusedOptimizer, t: int) -> None:
    if t > 1:
        opt.state[parameters(opt)[1]]["step"].fill_(10 * t)


def state_dict_replaced(opt: danlu.FusedOptimizer, t: int) -> None:
    for p in opt.state:
        opt.state[p] = {key: value.clone() for key, value in opt.state[p].items()}


def state_cleared(opt: danlu.FusedOptimizer, t: int) -> Tensors:
    old = [value for held in opt.state.values() for value in held.values()] if t % 2 else []
    if t % 2:
        opt.state.clear()
    return old


def state_deleted(opt: danlu.FusedOptimizer, t: int) -> Tensors:
    return list(opt.state.pop(parameters(opt)[t % FROZEN], {}).values())


def state_reordered(opt: danlu.FusedOptimizer, t: int) -> None:
    items = list(opt.state.items())[::-1]
    opt.state.clear()
    opt.state.update(items)


def state_exchanged(opt: danlu.FusedOptimizer, t: int) -> None:
    """Two parameters of one shape take each other's state."""
    if t == 0:
        opt.param_groups[0]["params"].append(parameter(SHAPES[0], 90))
    else:
        a, b = opt.param_groups[0]["params"][0], opt.param_groups[0]["params"][-1]
        opt.state[a], opt.state[b] = opt.state[b], opt.state[a]


def state_exchanged_in_place(opt: danlu.FusedOptimizer, t: int) -> None:
    """So that a walk over the states finds them in the old order, under other parameters."""
    state_exchanged(opt, t)
    if t:
        a, b = opt.param_groups[0]["params"][0], opt.param_groups[0]["params"][-1]
        keys = [{a: b, b: a}.get(p, p) for p in opt.state]
        held = {p: opt.state[p] for p in keys}
        opt.state.clear()
        opt.state.update(held)


def state_mapping(opt: danlu.FusedOptimizer, t: int) -> None:
    opt.state = defaultdict(dict, {p: dict(held) for p, held in opt.state.items()})


def params_reordered(opt: danlu.FusedOptimizer, t: int) -> None:
    opt.param_groups[t % 2]["params"].reverse()


def params_replaced(opt: danlu.FusedOptimizer, t: int) -> Tensors:
    params = opt.param_groups[t % 2]["params"]
    old, params[0] = params[0], parameter(params[0].shape, 50 + t)
    return [old.detach()]


def params_appended(opt: danlu.FusedOptimizer, t: int) -> None:
    opt.param_groups[t % 2]["params"].append(parameter((2, t), 60 + t))


def params_removed(opt: danlu.FusedOptimizer, t: int) -> Tensors:
    params = opt.param_groups[t % 2]["params"]
    return [params.pop().detach()] if params else []


def params_moved(opt: danlu.FusedOptimizer, t: int) -> None:
    a, b = (group["params"] for group in opt.param_groups)
    (b if t % 2 == 0 else a).append((a if t % 2 == 0 else b).pop(0))


def groups_reversed(opt: danlu.FusedOptimizer, t: int) -> None:
    opt.param_groups.reverse()


def groups_added(opt: danlu.FusedOptimizer, t: int) -> None:
    group = {**opt.param_groups[0], "params": [parameter((t,), 70 + t)], "lr": 0.01 * t}
    if t % 2:
        opt.add_param_group(group)
    else:
        opt.param_groups.append(group)


def groups_removed(opt: danlu.FusedOptimizer, t: int) -> Tensors:
    return [p.detach() for p in opt.param_groups.pop()["params"]] if t == 3 else []


def settings_swapped(opt: danlu.FusedOptimizer, t: int) -> None:
    a, b = opt.param_groups
    a["params"], b["params"] = b["params"], a["params"]
    opt.param_groups = [b, a]


def settings_changed(opt: danlu.FusedOptimizer, t: int) -> None:
    """Each step changes another setting of one of the groups."""
    changed = {
        "lr": 1e-3 / (t + 1),
        "weight_decay": 0.02 * t,
        "betas": (0.5 + 0.05 * t, 0.6 + 0.05 * t),
        "beta": 0.5 + 0.05 * t,
        "eps": (10.0**-t, 1e-3) if isinstance(opt, danlu.Adafactor) else 10.0**-t,
        "eps_mode": ("official", "hat", "inside")[t % 3],
        "maximize": True,
        "accumulation_steps": 1 + t % 3,
    }
    for i, group in enumerate(opt.param_groups):
        names = [name for name in changed if name in group]
        name = names[(t + 2 * i) % len(names)]
        group[name] = changed[name]


def lr_tensor(opt: danlu.FusedOptimizer, t: int) -> None:
    lr = opt.param_groups[0]["lr"]
    if isinstance(lr, torch.Tensor):
        lr.mul_(0.5)
    else:
        opt.param_groups[0]["lr"] = torch.tensor(lr)


CHANGES: list[Change] = [
    gradient_dtype,
    gradient_strides,
    gradient_negated,
    gradient_negated_in_place,
    gradient_late,
    gradient_first_late,
    gradients_alternate,
    no_gradients,
    parameter_data,
    parameter_set,
    parameter_strides,
    parameter_negated,
    parameter_swapped,
    module_dtype,
    state_replaced,
    state_data,
    state_set,
    state_dtype,
    state_incomplete,
    step_of_shape_one,
    step_number,
    state_dict_replaced,
    state_cleared,
    state_deleted,
    state_reordered,
    state_exchanged,
    state_exchanged_in_place,
    state_mapping,
    params_reordered,
    params_replaced,
    params_appended,
    params_removed,
    params_moved,
    groups_reversed,
    groups_added,
    groups_removed,
    settings_swapped,
    settings_changed,
    lr_tensor,
]


# each list of states and settings, each kind of sum; with --all every case
SOME = {
    *("lion", "tiger", "tiger-accumulate", "adamw", "adax-hat", "adafactor", "adafactor-momentum", "lamb"),
    *("tiger-rows", "amos", "layer-tiger-accumulate"),
}


@pytest.mark.pairs
@pytest.mark.parametrize("by", ["whole", "parts"])
@pytest.mark.parametrize(
    "case",
    [case if case.id in SOME else pytest.param(case, marks=pytest.mark.full) for case in ALL],
    ids=lambda c: c.id,
)
@pytest.mark.parametrize("change", CHANGES, ids=lambda c: c.__name__)
def test_a_change_is_seen_at_the_next_step(change: Change, case: Case, by: str, backend: str) -> None:
    """By the plan of all parameters, and by one for each of them."""
    params = [torch.nn.Parameter(values(shape, i, wild=False)) for i, shape in enumerate(SHAPES)]
    groups = [{"params": params[:2]}, {"params": params[2:], "lr": 5e-3, "weight_decay": 0.0}]
    opt = case.make(groups, backend=backend)
    parts: dict[torch.Tensor, Part] = {}
    for t in range(STEPS):
        for i, p in enumerate(params):
            if i != FROZEN:
                p.grad = None
                p.grad_dtype = p.dtype  # type: ignore[attr-defined]
                p.grad = values(p.shape, 10 * t + i, wild=False).to(p.dtype)
        left_behind = change(opt, t) or []
        contents = [old.detach().clone() for old in left_behind]
        gradients = [(p.grad.resolve_neg(), p.grad.clone()) for p in parameters(opt) if p.grad is not None]
        want = made_anew(case, opt)
        want.step()
        for p in parameters(opt) if by == "parts" else []:
            parts.setdefault(p, Part(opt, [p])).step()
        if by == "whole":
            opt.step()
        assert_same(case, opt, want)
        assert all(map(same_bits, left_behind, contents))
        assert all(same_bits(g, copy) for g, copy in gradients)


@pytest.mark.parametrize("case", ALL, ids=lambda c: c.id)
def test_each_parameter_steps_as_if_alone(case: Case, backend: str) -> None:
    """Whichever of them have a gradient; `step` counts only their own."""
    together = [torch.nn.Parameter(values((5,), i, wild=False)) for i in range(4)]
    alone = [twin(p) for p in together]
    opt = case.make(together, backend=backend)
    singles = [case.make([p], backend=backend) for p in alone]
    given = [0] * len(together)
    for t in range(8):
        for i, (p, q) in enumerate(zip(together, alone, strict=True)):
            has_gradient = (t >> i) % 2 == 0 and not (i == 3 and t < 4)
            given[i] += has_gradient
            p.grad = values((5,), 10 * t + i, wild=False) if has_gradient else None
            q.grad = None if p.grad is None else p.grad.clone()
        opt.step()
        for single in singles:
            single.step()
    for p, q, single, count in zip(together, alone, singles, given, strict=True):
        assert same_bits(p, q)
        assert opt.state[p].keys() == single.state[q].keys()
        assert all(same_bits(opt.state[p][key], value) for key, value in single.state[q].items())
        assert opt.state[p]["step"] == count // case.hyper.get("accumulation_steps", 1)


def test_replaced_tensors_are_not_kept_alive(backend: str) -> None:
    opt = danlu.AdamW([parameter((3,), 0)], backend=backend)
    opt.step()
    (p,), refs = parameters(opt), []
    for value in (p, *opt.state[p].values()):
        refs.append(weakref.ref(value))
    opt.param_groups[0]["params"][0] = parameter((3,), 1)
    opt.state.clear()
    del p, value
    opt.step()
    assert [ref() for ref in refs] == [None] * 4


def test_a_gradient_that_turns_sparse_is_named(backend: str) -> None:
    p = parameter((4, 3), 0)
    opt = danlu.Lion([("weight", p)], backend=backend)
    opt.step()
    p.grad = torch.sparse_coo_tensor([[0]], torch.ones(1, 3), (4, 3), check_invariants=True)
    with pytest.raises(TypeError, match="weight: the gradient is sparse"):
        opt.step()


@pytest.mark.parametrize(
    ("setting", "value"), [("betas", (1.0, 0.9)), ("lr", "fast"), ("weight_decay", None)], ids=str
)
def test_a_setting_that_cannot_be_used_changes_nothing(setting: str, value: object, backend: str) -> None:
    good, other = parameter((3,), 0), parameter((4,), 1)
    opt = danlu.AdamW([{"params": [good]}, {"params": [other]}], backend=backend)
    opt.step()
    kept, opt.param_groups[1][setting] = opt.param_groups[1][setting], value
    before = good.detach().clone()
    with pytest.raises((TypeError, ValueError, ZeroDivisionError)):
        opt.step()
    assert same_bits(good, before)
    assert opt.state[good]["step"] == opt.state[other]["step"] == 1
    opt.param_groups[1][setting] = kept
    opt.step()
    assert opt.state[good]["step"] == opt.state[other]["step"] == 2
