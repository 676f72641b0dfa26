"""Shapes, strides, offsets and dtypes that nobody chose: a step gives what the reference gives, and writes
nothing beside the tensors that are its own.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cases import CASES, F64, REDUCING, STORAGES, Case, Storage, set_gradient, values
from danlu.testing import same_bits

INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
# Normwise, after one step: a rounding of the result, and in fp32 what sums in another order leave.
TOLERANCE = {2: 3e-3, 4: 1e-6}
FILLED = 7.0  # what lies around views


@dataclass(frozen=True)
class Place:
    """Where a view lies in a larger buffer: dimensions in memory's order, elements before it, and gaps."""

    order: tuple[int, ...]
    offset: int
    gaps: tuple[int, ...]  # for each dimension, elements left out behind each


@dataclass(frozen=True)
class Tensor:
    shape: tuple[int, ...]
    param: Place
    grad: Place
    state: Place


class Held:
    """A view with the values of a tensor, and the buffer around it."""

    def __init__(self, x: torch.Tensor, place: Place) -> None:
        room = [x.shape[i] * (1 + place.gaps[i]) for i in place.order]
        size = math.prod(room)
        self.buffer = torch.full((place.offset + size + 9,), FILLED, dtype=x.dtype)
        inside = self.buffer[place.offset : place.offset + size].view(room)
        inside = inside.permute([place.order.index(i) for i in range(x.dim())])
        self.view = inside[tuple(slice(None, None, 1 + gap) for gap in place.gaps)]
        self.view.copy_(x)
        assert self.view.shape == x.shape

    def untouched_around(self) -> bool:
        around = torch.ones(self.buffer.shape, dtype=torch.bool)
        around.as_strided(self.view.shape, self.view.stride(), self.view.storage_offset()).fill_(False)
        return bool((self.buffer[around] == FILLED).all())


def places(shape: tuple[int, ...], gaps: bool) -> st.SearchStrategy[Place]:
    """Most tensors of models have no gaps, and kernels take no parameters that have."""
    left_out = st.integers(0, 2) if gaps else st.just(0)
    return st.builds(
        Place,
        st.permutations(range(len(shape))).map(tuple),
        st.integers(0, 9),
        st.tuples(*(left_out for _ in shape)),
    )


SHAPES = st.one_of(
    st.lists(st.integers(0, 9), max_size=4).map(tuple),
    st.tuples(st.integers(1, 90), st.integers(1, 90)),
    # around the ends of vectors and chunks
    st.tuples(st.sampled_from([15, 16, 17, 1023, 4097, 65535, 65537, 131073])),
)


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    shape = draw(SHAPES)
    param = draw(places(shape, gaps=draw(st.integers(0, 7)) == 0))
    # states are made in their parameter's order; a checkpoint's may lie otherwise
    state = draw(st.one_of(st.just(param.order), st.permutations(range(len(shape))).map(tuple)))
    return Tensor(
        shape,
        param,
        draw(places(shape, gaps=draw(st.booleans()))),
        Place(state, draw(st.integers(0, 9)), param.gaps),
    )


def some(cases: list[Case], most: int) -> Any:
    """A decorator: the test gets rules, formats and tensors; the same ones each time."""

    def decorate(test: Any) -> Any:
        drawn = given(
            case=st.sampled_from(cases),
            storage=st.sampled_from(STORAGES),
            made=st.lists(tensors(), min_size=1, max_size=3),
            threads=st.integers(1, 3),
        )(test)
        return settings(
            max_examples=most,
            derandomize=True,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        )(drawn)

    return decorate


def stepped(
    case: Case, storage: Storage, made: list[Tensor], backend: str, *, placed: bool, wild: bool
) -> tuple[list[dict[str, torch.Tensor]], list[Held]]:
    """After one step: parameters and states, and what holds them; contiguous ones are not `placed`."""
    params, gradients, held, results = [], [], [], []

    def hold(x: torch.Tensor, place: Place) -> torch.Tensor:
        if not placed:
            return x
        held.append(Held(x, place))
        return held[-1].view

    in_float64 = not placed and not wild
    for i, tensor in enumerate(made):
        start = values(tensor.shape, i, wild=wild).to(storage.param)
        g = values(tensor.shape, 100 + i, wild=wild).to(storage.grad)
        if in_float64:
            start, g = start.to(F64), g.to(F64)
        params.append(torch.nn.Parameter(hold(start, tensor.param)))
        gradients.append(hold(g, tensor.grad))
    opt = case.make(params, backend=backend, state_dtype=storage.moment)
    opt.make_state()
    for i, (tensor, p) in enumerate(zip(made, params, strict=True)):
        for k, (name, kept) in enumerate(opt.state[p].items()):
            if kept.dim() and "step" not in name and kept.shape == p.shape:
                x = values(tensor.shape, 200 + 10 * i + k, wild=wild)
                x = (x if name == "exp_avg" else x.abs()).to(
                    storage.moment if name == "exp_avg" else kept.dtype
                )
                opt.state[p][name] = hold(x.to(kept.dtype), tensor.state)
    before = [g.clone() for g in gradients]
    for p, g in zip(params, gradients, strict=True):
        set_gradient(p, g)
    opt.step()
    assert all(map(same_bits, gradients, before))
    for p in params:
        results.append({"param": p.detach(), **opt.state[p]})
    return results, held


def same_bits_as_the_reference(case: Case, storage: Storage, made: list[Tensor], threads: int) -> None:
    torch.set_num_threads(threads)
    got, held = stepped(case, storage, made, "cpu", placed=True, wild=True)
    want, _ = stepped(case, storage, made, "reference", placed=False, wild=True)
    for a, b in zip(got, want, strict=True):
        assert [name for name in b if not same_bits(a[name], b[name])] == []
    assert all(one.untouched_around() for one in held)


def close_to_float64(case: Case, storage: Storage, made: list[Tensor], threads: int) -> None:
    torch.set_num_threads(threads)
    got, held = stepped(case, storage, made, "cpu", placed=True, wild=False)
    want, _ = stepped(case, storage, made, "reference", placed=False, wild=False)
    for a, b in zip(got, want, strict=True):
        for name in b:
            difference = (a[name].double() - b[name].double()).norm()
            assert difference <= TOLERANCE[a[name].element_size()] * b[name].double().norm(), name
    assert all(one.untouched_around() for one in held)


test_same_bits_as_the_reference = some(CASES, 60)(same_bits_as_the_reference)
test_close_to_float64 = some(REDUCING, 40)(close_to_float64)
test_many_same_bits_as_the_reference = pytest.mark.full(some(CASES, 2000)(same_bits_as_the_reference))
test_many_close_to_float64 = pytest.mark.full(some(REDUCING, 1500)(close_to_float64))


def test_views_are_what_is_asked_for() -> None:
    """And what lies around them is looked at: each element of a buffer but those of the view."""
    x = torch.arange(6.0).view(2, 3)
    for order, offset, gaps in itertools.product([(0, 1), (1, 0)], [0, 3], [(0, 0), (1, 2)]):
        one = Held(x, Place(order, offset, gaps))
        assert torch.equal(one.view, x)
        assert one.view.storage_offset() == offset
        assert one.view.stride()[order[-1]] == 1 + gaps[order[-1]]
        assert one.untouched_around()
        seen = 0
        for i in range(len(one.buffer)):
            kept = one.buffer[i].item()
            one.buffer[i] = -1.0
            seen += not one.untouched_around()
            one.buffer[i] = kept
        assert seen == len(one.buffer) - x.numel()
