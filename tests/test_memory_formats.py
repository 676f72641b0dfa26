"""Parameters, states and gradients in different orders of strides: all take the kernels, with their bits."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable

import pytest
import torch

import danlu
from cases import ALL, BACKENDS, BF16, Case, set_gradient, values
from danlu.backends.native import NativeExecutor
from danlu.testing import same_bits
from layouts import every_second, permuted
from training import parameters

KINDS = (
    *("lion", "tiger-accumulate", "adamw", "adafactor-momentum", "adafactor-optax", "tiger-matrix"),
    *("tiger-rows", "amos", "layer-adamw"),
)
some_cases = pytest.mark.parametrize("case", [c for c in ALL if c.id in KINDS], ids=lambda c: c.id)
SHAPES = ((6, 3, 2, 4), (5,), (4, 7), (2, 1, 3, 1))
COPIED = "the gradient is copied to the parameter's strides"
COPYING = [name for name in BACKENDS if name != "reference"]
Place = Callable[[torch.Tensor], torch.Tensor]
otherwise = permuted(1, 0)


def channels_last(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x


def contiguous(x: torch.Tensor) -> torch.Tensor:
    return x.clone(memory_format=torch.contiguous_format)


def made(case: Case, place: Place, backend: str) -> danlu.FusedOptimizer:
    params = [torch.nn.Parameter(place(values(shape, i, wild=False))) for i, shape in enumerate(SHAPES)]
    return case.make(params, backend=backend)


def go(opt: danlu.FusedOptimizer, steps: range, place: Place) -> None:
    for t in steps:
        for i, p in enumerate(parameters(opt)):
            p.grad = place(values(p.shape, 10 * t + i, wild=False))
        opt.step()


def takers(opt: danlu.FusedOptimizer) -> set[str]:
    return {row.backend for row in opt.backend_report()}


def natives(opt: danlu.FusedOptimizer) -> set[str]:
    """Rules that sum over rows or columns need contiguous parameters."""
    p = parameters(opt)[0]
    seen = opt.matrix(opt.param_groups[0], tuple(p.shape))
    sums = seen is None or seen[:2] != (1, 1)
    return {opt.backend, "reference"} if sums and not p.is_contiguous() else {opt.backend}


def assert_agree(case: Case, a: danlu.FusedOptimizer, b: danlu.FusedOptimizer) -> None:
    for p, q in zip(parameters(a), parameters(b), strict=True):
        assert case.agrees(p.detach(), q.detach())
        assert all(case.agrees(a.state[p][name], value) for name, value in b.state[q].items())


@some_cases
def test_a_contiguous_checkpoint_of_a_channels_last_model(case: Case, backend: str) -> None:
    """The state is laid out once, where the next step is planned; what was loaded is not written."""
    first = made(case, contiguous, backend)
    go(first, range(2), contiguous)
    saved = copy.deepcopy(first.state_dict())
    kept = copy.deepcopy(saved)
    opt, reference = made(case, channels_last, backend), made(case, channels_last, "reference")
    for o in (opt, reference):
        o.load_state_dict(copy.deepcopy(saved))
        assert takers(o) == natives(o)
        go(o, range(2, 4), channels_last)
    assert takers(opt) == natives(opt)
    assert_agree(case, opt, reference)
    for p in parameters(opt):
        assert all(s.stride() == p.stride() for s in opt.state[p].values() if s.shape == p.shape)
    again = opt.state_dict()
    assert str(saved) == str(kept)
    for key, held in saved["state"].items():
        assert {k: v.shape for k, v in held.items()} == {k: v.shape for k, v in again["state"][key].items()}


@some_cases
def test_a_model_that_becomes_channels_last_amid_training(case: Case, backend: str) -> None:
    opt, reference = made(case, contiguous, backend), made(case, contiguous, "reference")
    for o in (opt, reference):
        go(o, range(2), contiguous)
        for p in parameters(o):
            p.data = channels_last(p.data)
        go(o, range(2, 4), channels_last)
    assert takers(opt) == natives(opt)
    plan = opt._plan
    go(opt, range(4, 5), channels_last)
    assert opt._plan is plan
    go(reference, range(4, 5), channels_last)
    assert_agree(case, opt, reference)


@some_cases
def test_states_of_other_shapes_are_made_contiguous(case: Case, backend: str) -> None:
    """Averages over rows and columns, which kernels read as lists."""
    opt = made(case, contiguous, backend)
    go(opt, range(2), contiguous)
    saved = copy.deepcopy(opt.state_dict())
    for held in saved["state"].values():
        held.update({name: s.mT.contiguous().mT if s.ndim > 1 else s for name, s in held.items()})
    new = made(case, contiguous, backend)
    for p, q in zip(parameters(new), parameters(opt), strict=True):
        p.data.copy_(q)
    new.load_state_dict(saved)
    for o in (opt, new):
        go(o, range(2, 4), contiguous)
    for p, q in zip(parameters(new), parameters(opt), strict=True):
        assert all(map(same_bits, (p, *new.state[p].values()), (q, *opt.state[q].values())))


FORMS: dict[str, Place] = {
    "transposed": lambda g: g.mT.contiguous().mT if g.ndim > 1 else g,
    "channels last": channels_last,
    "with gaps": every_second,
    "negated": lambda g: torch._neg_view(-g),
    "expanded": lambda g: g[:1].expand(g.shape),
}


@some_cases
def test_gradients_that_lie_otherwise_in_every_second_step(case: Case, backend: str) -> None:
    """No new plan is made for one, none is written, and no copy lives on."""
    opt, reference = made(case, contiguous, backend), made(case, contiguous, "reference")
    plans = set()
    forms = [contiguous, *(f for other in FORMS.values() for f in (other, contiguous))]
    for t, form in enumerate(forms):
        for o in (opt, reference):
            for i, p in enumerate(parameters(o)):
                p.grad = form(values(p.shape, 10 * t + i, wild=False))
            before = [(p.grad.clone(), p.grad.stride()) for p in parameters(o) if p.grad is not None]
            o.step()
            after = [(p.grad, p.grad.stride()) for p in parameters(o) if p.grad is not None]
            assert all(torch.equal(a, b) and s == u for (a, s), (b, u) in zip(before, after, strict=True))
        plans.add(opt._plan)
        assert_agree(case, opt, reference)
    assert len(plans) == 1


def test_the_report_says_which_gradients_are_copied(backend: str) -> None:
    opt = danlu.AdamW([torch.nn.Parameter(torch.ones(3, 4)) for _ in range(2)], backend=backend)
    first, second = parameters(opt)
    first.grad, second.grad = otherwise(torch.ones(3, 4)), torch.ones(3, 4)
    for _ in range(2):
        reasons = [row.reason for row in opt.backend_report()]
        assert [COPIED in reason for reason in reasons] == [backend != "reference", False]
        opt.step()


@pytest.mark.parametrize("backend", COPYING, indirect=True)
def test_a_copy_lives_for_one_step(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    copies: list[weakref.ref[torch.Tensor]] = []
    copy_gradient = NativeExecutor._copy_gradient

    def noted(executor: NativeExecutor, i: int) -> torch.Tensor | None:
        made = copy_gradient(executor, i)
        assert made is not None
        copies.append(weakref.ref(made))
        return made

    monkeypatch.setattr(NativeExecutor, "_copy_gradient", noted)
    p = torch.nn.Parameter(torch.ones(3, 4))
    opt = danlu.AdamW([p], backend=backend)
    for form in (contiguous, otherwise, contiguous, otherwise):
        p.grad = form(torch.ones(3, 4))
        opt.step()
    assert [ref() for ref in copies] == [None, None]


def test_a_gradient_of_16_bits_is_copied_as_it_is(backend: str) -> None:
    results = []
    for name in (backend, "reference"):
        p = torch.nn.Parameter(values((5, 6), 0, wild=False))
        opt = danlu.Lion([p], backend=name)
        for t in range(3):
            set_gradient(p, otherwise(values((5, 6), t, wild=False).to(BF16)))
            opt.step()
        results.append((p.detach(), opt.state[p]["exp_avg"]))
    assert all(map(same_bits, *results))


def test_the_norm_is_that_of_copied_gradients(backend: str) -> None:
    results = []
    for form in (contiguous, otherwise):
        p = torch.nn.Parameter(values((50, 60), 0, wild=False))
        opt = danlu.AdamW([p], max_grad_norm=0.5, backend=backend)
        for t in range(3):
            p.grad = form(values((50, 60), t, wild=False))
            opt.step()
        results.append(p.detach())
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("backend", COPYING, indirect=True)
def test_an_error_while_a_gradient_is_copied_changes_nothing(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    opt = danlu.AdamW([torch.nn.Parameter(torch.ones(3, 4)) for _ in range(2)], backend=backend)
    for p in parameters(opt):
        p.grad = torch.ones(3, 4)
    opt.step()
    before = [p.detach().clone() for p in parameters(opt)]
    parameters(opt)[1].grad = otherwise(torch.ones(3, 4))

    def fail(*_: object) -> None:
        raise MemoryError("no room")

    with monkeypatch.context() as m:
        m.setattr(NativeExecutor, "_copy_gradient", fail)
        with pytest.raises(MemoryError, match="no room"):
            opt.step()
    assert all(map(same_bits, parameters(opt), before))
    assert {held["step"].item() for held in opt.state.values()} == {1}
    opt.step()
    assert {held["step"].item() for held in opt.state.values()} == {2}


def test_states_that_are_negated_views_are_written_out() -> None:
    p = torch.nn.Parameter(torch.ones(3, 4))
    p.grad = torch.ones(3, 4)
    opt = danlu.Lion([p], backend="cpu")
    opt.step()
    opt.state[p]["exp_avg"] = torch._neg_view(torch.ones(3, 4))
    opt.step()
    assert takers(opt) == {"cpu"}
    assert not opt.state[p]["exp_avg"].is_neg()


def test_state_of_a_parameter_with_gaps_stays_where_it_is() -> None:
    p = torch.nn.Parameter(every_second(torch.ones(3, 4)))
    p.grad = torch.ones(3, 4)
    opt = danlu.Lion([p])
    opt.step()
    moment = opt.state[p]["exp_avg"]
    opt.load_state_dict(opt.state_dict())
    opt.step()
    assert opt.state[p]["exp_avg"].data_ptr() == moment.data_ptr()
    assert takers(opt) == {"reference"}
