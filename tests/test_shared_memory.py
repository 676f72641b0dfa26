"""Parameters, gradients and states over one memory: stepped in turn as torch does, or refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import danlu
from cases import CASES, REDUCING, Case, values
from danlu.testing import same_bits

ROWS, COLUMNS = 96, 40
MADE = [case for case in CASES + REDUCING if case.id in ("lion", "adamw", "lamb", "layer-adamw")]
every_case = pytest.mark.parametrize("case", MADE, ids=lambda c: c.id)


def whole(m: torch.Tensor) -> list[torch.Tensor]:
    return [m, m]


def halves(m: torch.Tensor) -> list[torch.Tensor]:
    return [m[:72], m[24:], m]


def columns(m: torch.Tensor) -> list[torch.Tensor]:
    """Interleaved, with no element in two of them."""
    return [m[:, ::2], m[:, 1::2]]


def apart(m: torch.Tensor) -> list[torch.Tensor]:
    return [m[:48], m[48:]]


def given(views: list[torch.Tensor]) -> list[torch.nn.Parameter]:
    params = [torch.nn.Parameter(view) for view in views]
    for i, p in enumerate(params):
        p.grad = values(p.shape, i, wild=False)
    return params


def in_turn(
    case: Case, m: torch.Tensor, view: Callable[..., list[torch.Tensor]], steps: int, **engine: Any
) -> None:
    """What a step of all has to give: an optimizer for each parameter, one after the other."""
    params = given(view(m))
    made = [case.make([p], backend="reference", **engine) for p in params]
    for _ in range(steps):
        for opt in made:
            opt.step()


def parts(opt: danlu.FusedOptimizer) -> int:
    assert opt._plan is not None
    return len(opt._plan._executors)


@every_case
@pytest.mark.parametrize("view", [whole, halves, columns])
def test_parameters_over_one_memory_are_stepped_in_turn(view: Any, case: Case, backend: str) -> None:
    m, wanted = (values((ROWS, COLUMNS), 7, wild=False) for _ in range(2))
    params = given(view(m))
    groups = [{"params": params[:1]}, {"params": params[1:]}]
    opt = case.make(groups, backend=backend)
    for _ in range(2):
        opt.step()
    in_turn(case, wanted, view, steps=2)
    by_kernels = backend != "reference" and params[0].is_contiguous()
    assert parts(opt) == (len(params) if by_kernels else 1)
    assert case.agrees(m, wanted)


def test_others_are_stepped_together(backend: str) -> None:
    m = values((ROWS, COLUMNS), 7, wild=False)
    other = torch.zeros(0)
    params = given([*apart(m), other, torch.zeros(0), torch.zeros(3)])
    shared = torch.ones(48, COLUMNS)
    params[0].grad = params[1].grad = shared  # is only read
    opt = danlu.AdamW(params, backend=backend)
    opt.step()
    assert parts(opt) == 1


def test_only_what_shares_memory_waits(backend: str) -> None:
    m = values((ROWS, COLUMNS), 7, wild=False)
    params = given([torch.zeros(5), m, torch.zeros(6), m, torch.zeros(7)])
    opt = danlu.Lion(params, backend=backend)
    opt.step()
    assert parts(opt) == (1 if backend == "reference" else 2)
    assert opt._plan is not None
    assert [len(executor._specs) for executor in opt._plan._executors][-1] == (
        5 if backend == "reference" else 1
    )


def test_the_norm_counts_every_gradient(backend: str) -> None:
    m, wanted = torch.zeros(4), torch.zeros(4)
    params = given([m, m])
    for p in params:
        p.grad = torch.full((4,), 3.0)
    case = next(c for c in CASES if c.id == "adam")
    opt = case.make(params, max_grad_norm=1.0, backend=backend)
    opt.step()
    scale = 1 / torch.full((8,), 3.0).norm().item()
    for p in given([wanted, wanted]):
        p.grad = torch.full((4,), 3.0 * scale)
        case.make([p], backend="reference").step()
    torch.testing.assert_close(m, wanted)


@pytest.mark.parametrize("mode", ["rows", "params"])
def test_lazy_parameters_over_one_memory(mode: str, backend: str) -> None:
    results = []
    for chosen in (backend, "reference"):
        m = values((ROWS, COLUMNS), 7, wild=False)
        params = given([m, m])
        for p in params:
            p.grad[::2] = 0  # type: ignore[index]
        opt = danlu.Lazy(danlu.Lion(params, lr=0.1, backend=chosen), mode=mode)
        opt.step()
        results.append(m)
    assert same_bits(*results)


def test_memory_that_comes_to_be_shared(backend: str) -> None:
    """By `p.data = ...`, between two steps."""
    case = next(c for c in CASES if c.id == "lion")
    results = []
    for chosen in (backend, "reference"):
        params = given([values((ROWS, COLUMNS), i, wild=False) for i in range(3)])
        opt = case.make(params, backend=chosen)
        opt.step()
        params[2].data = params[0].data
        for _ in range(2):
            opt.step()
        results.append([p.detach().clone() for p in params])
        assert parts(opt) == (1 if chosen == "reference" else 2)
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))


def test_parameters_that_move_keep_their_plan(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    params = given([values((20, 5), i, wild=False) for i in range(3)])
    opt = danlu.Lion(params, backend=backend)
    opt.step()
    plan = opt._plan
    for _ in range(3):
        for p in params:
            p.data = p.detach().clone()
        opt.step()
        assert opt._plan is plan


@every_case
def test_a_state_of_two_parameters(case: Case, backend: str) -> None:
    """One after the other, as torch's loop over parameters does."""
    results = []
    for chosen in (backend, "reference"):
        params = given([values((ROWS, COLUMNS), i, wild=False) for i in range(2)])
        opt = case.make(params, backend=chosen)
        opt.step()
        opt.state[params[1]]["exp_avg"] = opt.state[params[0]]["exp_avg"]
        opt.step()
        results.append([*(p.detach() for p in params), opt.state[params[0]]["exp_avg"]])
    assert all(case.agrees(a, b) for a, b in zip(*results, strict=True))


def shared_step(params: list[torch.nn.Parameter], opt: danlu.FusedOptimizer) -> None:
    opt.state[params[1]]["step"] = opt.state[params[0]]["step"]


def states_of_one(params: list[torch.nn.Parameter], opt: danlu.FusedOptimizer) -> None:
    opt.state[params[1]]["exp_avg"] = opt.state[params[1]]["exp_avg_sq"]


def parameter_as_state(params: list[torch.nn.Parameter], opt: danlu.FusedOptimizer) -> None:
    opt.state[params[1]]["exp_avg"] = params[1].detach()


def gradient_beside_its_parameter(params: list[torch.nn.Parameter], opt: danlu.FusedOptimizer) -> None:
    memory = torch.zeros(9)
    params[1].data = memory[:8]
    params[1].grad = memory[1:]
    opt._drop_plan()  # a step looks for it only where it makes a plan


@pytest.mark.parametrize(
    ("share", "message"),
    [
        (shared_step, r"^(first|second): state 'step' shares memory with the state 'step' of (first|second)"),
        (states_of_one, r"^second: state 'exp_avg(_sq)?' and state 'exp_avg(_sq)?' share memory"),
        (parameter_as_state, "^second: (state 'exp_avg' and parameter|parameter and state 'exp_avg') share"),
        (gradient_beside_its_parameter, "^second: (gradient and parameter|parameter and gradient) share"),
    ],
)
def test_what_has_no_right_result_is_refused(share: Any, message: str, backend: str) -> None:
    named = [("first", torch.nn.Parameter(torch.ones(8))), ("second", torch.nn.Parameter(torch.ones(8)))]
    params = [p for _, p in named]
    opt = danlu.AdamW(named, backend=backend)
    for p in params:
        p.grad = torch.ones(8)
    opt.step()
    share(params, opt)
    held = [t.clone() for p in params for t in (p.detach(), *opt.state[p].values())]
    with pytest.raises(ValueError, match=message):
        opt.step()
    now = [t for p in params for t in (p.detach(), *opt.state[p].values())]
    assert all(same_bits(a, b) for a, b in zip(held, now, strict=True))


@pytest.mark.parametrize("case", MADE[1:3], ids=lambda c: c.id)
@pytest.mark.parametrize("what", ["its parameter", "its state", "another parameter"])
def test_a_gradient_that_is_written(what: str, case: Case, backend: str) -> None:
    """Every element is read before it is written, and other parameters' are in turn."""
    results = []
    for chosen in (backend, "reference"):
        params = given([values((ROWS, COLUMNS), i, wild=False) for i in range(2)])
        opt = case.make(params, backend=chosen)
        opt.step()
        of = dict(zip(("its parameter", "its state", "another parameter"), (0, 0, 1), strict=True))[what]
        params[0].grad = opt.state[params[0]]["exp_avg"] if what == "its state" else params[of].detach()
        opt._drop_plan()
        for _ in range(2):
            opt.step()
        results.append([p.detach() for p in params])
    assert all(case.agrees(a, b) for a, b in zip(*results, strict=True))
