"""What is validated once for all parameters that look alike is what each one's own validation gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import danlu
from cases import ALL, BF16, Case, values
from danlu import describe as module
from danlu import shared_memory
from danlu.describe import Descriptions, choose, describe
from danlu.plan import Plan, named_parameters

Change = Callable[[danlu.FusedOptimizer, torch.nn.Parameter], object]
MADE = [case for case in ALL if case.id in ("lion", "adamw", "adafactor", "layer-adamw")]


def gradient(p: torch.nn.Parameter) -> torch.Tensor:
    assert p.grad is not None
    return p.grad


class Subclass(torch.Tensor):
    pass


def nothing(opt: danlu.FusedOptimizer, p: torch.nn.Parameter) -> None:
    pass


def a_shape(opt: danlu.FusedOptimizer, p: torch.nn.Parameter) -> None:
    p.data, p.grad = p.data[:5].clone(), None  # with the strides of the others
    p.grad = torch.ones(5, 4)


def strides(opt: danlu.FusedOptimizer, p: torch.nn.Parameter) -> None:
    p.data = p.data.t().contiguous().t()


def gaps(opt: danlu.FusedOptimizer, p: torch.nn.Parameter) -> None:
    p.data = torch.zeros(6, 8)[:, ::2]


def expanded(opt: danlu.FusedOptimizer, p: torch.nn.Parameter) -> None:
    p.data = torch.zeros(4).expand(6, 4)


def negated(opt: danlu.FusedOptimizer, p: torch.nn.Parameter) -> None:
    p.data = torch._neg_view(p.data)


def a_dtype(opt: danlu.FusedOptimizer, p: torch.nn.Parameter) -> None:
    p.grad, p.data = None, p.data.double()
    p.grad = torch.ones(6, 4).double()


def a_subclass(opt: danlu.FusedOptimizer, p: torch.nn.Parameter) -> None:
    p.grad = gradient(p).as_subclass(Subclass)


def a_parameter_as_gradient(opt: danlu.FusedOptimizer, p: torch.nn.Parameter) -> None:
    p.grad = torch.nn.Parameter(gradient(p))


def no_gradient(opt: danlu.FusedOptimizer, p: torch.nn.Parameter) -> None:
    p.grad = None


def gradient_dtype(opt: danlu.FusedOptimizer, p: torch.nn.Parameter) -> None:
    p.grad = None
    p.grad_dtype = BF16  # type: ignore[attr-defined]
    p.grad = torch.ones(6, 4).bfloat16()


def sparse(opt: danlu.FusedOptimizer, p: torch.nn.Parameter) -> None:
    p.grad = gradient(p).to_sparse()


def a_mark(opt: danlu.FusedOptimizer, p: torch.nn.Parameter) -> None:
    p.ds_id = 1  # type: ignore[attr-defined]


def another_group(opt: danlu.FusedOptimizer, p: torch.nn.Parameter) -> None:
    opt.param_groups[0]["params"].pop()
    opt.add_param_group({"params": [p]})


def a_state_too_few(opt: danlu.FusedOptimizer, p: torch.nn.Parameter) -> None:
    del opt.state[p][next(iter(opt.state[p]))]


def state_dtype(opt: danlu.FusedOptimizer, p: torch.nn.Parameter) -> None:
    held = opt.state[p]
    held.update({key: x.bfloat16() for key, x in held.items() if key != "step"})


def state_shape(opt: danlu.FusedOptimizer, p: torch.nn.Parameter) -> None:
    opt.state[p].update({key: torch.zeros(5, 4) for key in opt.state[p] if key != "step"})


def state_expanded(opt: danlu.FusedOptimizer, p: torch.nn.Parameter) -> None:
    held = opt.state[p]
    held.update({key: torch.zeros(1).expand(x.shape) for key, x in held.items() if key != "step"})


def state_number(opt: danlu.FusedOptimizer, p: torch.nn.Parameter) -> None:
    opt.state[p]["step"] = 1


def state_subclass(opt: danlu.FusedOptimizer, p: torch.nn.Parameter) -> None:
    held = opt.state[p]
    held.update({key: x.as_subclass(Subclass) for key, x in held.items()})


def counter_shape(opt: danlu.FusedOptimizer, p: torch.nn.Parameter) -> None:
    opt.state[p]["step"] = torch.ones(1)


def counter_dtype(opt: danlu.FusedOptimizer, p: torch.nn.Parameter) -> None:
    opt.state[p]["step"] = torch.ones((), dtype=torch.int64)


def on_meta(opt: danlu.FusedOptimizer, p: torch.nn.Parameter) -> None:
    opt.state[p] = {key: x.to("meta") for key, x in opt.state[p].items()}


CHANGES: list[Change] = [
    nothing,
    a_shape,
    strides,
    gaps,
    expanded,
    negated,
    a_dtype,
    a_subclass,
    a_parameter_as_gradient,
    no_gradient,
    gradient_dtype,
    sparse,
    a_mark,
    another_group,
    a_state_too_few,
    state_dtype,
    state_shape,
    state_expanded,
    state_number,
    state_subclass,
    counter_shape,
    counter_dtype,
    on_meta,
]


def some(case: Case, backend: str, count: int = 3) -> danlu.FusedOptimizer:
    params = [torch.nn.Parameter(values((6, 4), i, wild=False)) for i in range(count)]
    for i, p in enumerate(params):
        p.grad = values((6, 4), 10 + i, wild=False)
    return case.make(params, backend=backend)


def outcome(work: Callable[[], tuple[Any, Any]]) -> object:
    """Of a description: all that backends read of it, with what they were given; or the error."""
    try:
        spec, backend = work()
    except (TypeError, ValueError) as error:
        return type(error), str(error)
    held = spec.state
    return {**vars(spec), "param": id(spec.param), "state": {k: id(x) for k, x in held.items()}}, backend.name


@pytest.mark.pairs
@pytest.mark.parametrize("stepped", [True, False], ids=["with states", "without"])
@pytest.mark.parametrize("case", MADE, ids=lambda c: c.id)
@pytest.mark.parametrize("change", CHANGES, ids=lambda c: c.__name__)
def test_the_last_of_some_is_described_as_by_itself(
    change: Change, case: Case, stepped: bool, backend: str
) -> None:
    opt = some(case, backend)
    if stepped:
        opt.step()
    elif change in CHANGES[CHANGES.index(a_state_too_few) :]:
        opt.make_state()
    change(opt, opt.param_groups[0]["params"][-1])
    descriptions = Descriptions(opt)
    for named in named_parameters(opt):

        def alone(named: Any = named) -> tuple[Any, Any]:
            spec = describe(opt, *named)
            return spec, choose(opt, spec)[0]

        assert outcome(lambda named=named: descriptions.of(*named)) == outcome(alone)  # type: ignore[misc]


def test_one_of_those_that_look_alike_is_validated_in_full(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    opt = some(MADE[0], backend, 50)
    names = []

    def noted(*arguments: Any) -> Any:
        names.append(arguments[2])
        return describe(*arguments)

    monkeypatch.setattr(module, "describe", noted)
    for _ in range(2):
        Plan(opt)
    assert names == ["param_groups[0]['params'][0]"] * 2


def test_states_in_another_order_are_laid_out_in_each(backend: str) -> None:
    opt = some(MADE[1], backend)
    opt.step()
    for held in opt.state.values():
        held["exp_avg"] = held["exp_avg"].t().contiguous().t()
    Plan(opt)
    assert all(held["exp_avg"].is_contiguous() for held in opt.state.values())


@pytest.mark.parametrize("seed", range(40))
def test_ranges_that_are_apart(seed: int) -> None:
    """By sorted ends alone as by looking at every pair."""
    generator = torch.Generator().manual_seed(seed)
    memory = torch.zeros(80)
    params = []
    for _ in range(2 + seed % 4):
        begin, length, stride = torch.randint(0, 9, (3,), generator=generator).tolist()
        view = memory.as_strided((length,), (1 + stride % 3,), 4 * begin)
        params.append(torch.nn.Parameter(view))
    opt = danlu.Lion(params, backend="reference")
    for p in params:
        p.grad = torch.zeros_like(p)
    specs = [describe(opt, *named) for named in named_parameters(opt)]
    spans = []
    for p in params:
        if p.numel():
            begin = p.storage_offset()
            spans.append(range(begin, begin + 1 + (p.numel() - 1) * p.stride(0)))
    together = any(set(a) & set(b) for i, a in enumerate(spans) for b in spans[i + 1 :])
    assert shared_memory._all_apart(specs) == (not together)
    assert bool([*shared_memory._overlapping(specs)]) == together
