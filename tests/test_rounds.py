"""A step that stops where its sums are complete: two halves that add theirs step as the whole tensor does."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import danlu
from cases import EVERY_REDUCING, Case, values
from danlu.backends.reducing_rounds import ReducingRounds, Summations, reducing_rounds
from danlu.plan import Plan
from danlu.scale import Scaling
from danlu.schedule import FIELDS, Summation
from danlu.spec import Stop
from emulated import Emulated
from reductions import CASE, LAST_BIT, TOLERANCE, difference
from training import give_gradients, parameters

STEPS = 2
# with a dimension and where it is cut; presets factor dimensions of 128 and more
CUTS = [
    *[((262, 264), 0, 131), ((262, 264), 1, 130), ((3, 130, 131), 0, 1), ((1001,), 0, 400), ((7, 5), 0, 2)],
    *[((33, 40), 0, 0), ((33, 40), 1, 40)],  # one part has nothing
]
# these look at a part's own shape for the dimensions that they factor
BY_SIZE = ("adafactor-optax", "adafactor-torch", "adafactor-big-vision", "adafactor-root")


def one(case: Case, p: torch.Tensor, backend: str) -> Any:
    return case.make([torch.nn.Parameter(p.clone().contiguous())], backend=backend)


def parameter(opt: Any) -> torch.nn.Parameter:
    (p,) = opt.param_groups[0]["params"]
    return p


@torch.no_grad()
def step_together(opts: list[Any], dim: int) -> int:
    """Steps parts of a tensor that was cut along a dimension; how often they stopped."""
    plans = [Plan(opt) for opt in opts]
    running = []
    for opt, plan in zip(opts, plans, strict=True):
        assert plan._refresh(opt)
        (executor,) = plan._executors
        (scale,) = plan._scales(Scaling.of(opt, None))
        executor.prepare(opt, scale)
        running.append(executor.rounds())
    stops = 0
    for found in itertools.zip_longest(*running):
        add_up(found, dim)
        stops += 1
    for plan in plans:
        for executor in plan._executors:
            executor.release()
    return stops


def add_up(stops: tuple[Stop, ...], dim: int) -> None:
    """Gives every part the sums of the whole."""
    for tensors in zip(*stops, strict=True):
        for parts in zip(*(sums for _, sums in tensors), strict=True):
            assert len({part.dims for part in parts}) == 1
            if dim not in parts[0].dims:
                continue
            total, count = sum(part.values for part in parts), sum(part.count for part in parts)
            for part in parts:
                part.values.copy_(total)
                part.count = count


def cut(x: torch.Tensor, dim: int, at: int) -> list[torch.Tensor]:
    return list(x.split([at, x.shape[dim] - at], dim))


def applies(case: Case, shape: tuple[int, ...]) -> bool:
    return len(shape) >= -min(case.hyper.get("reduce_dims", (0,)) or (0,))


@pytest.mark.pairs
@pytest.mark.parametrize(("shape", "dim", "at"), CUTS, ids=lambda x: str(x).replace(" ", ""))
@pytest.mark.parametrize("case", EVERY_REDUCING, ids=lambda c: c.id)
def test_two_halves_step_as_the_whole(
    case: Case, backend: str, shape: tuple[int, ...], dim: int, at: int
) -> None:
    check_two_halves(case, backend, shape, dim, at)


def check_two_halves(case: Case, backend: str, shape: tuple[int, ...], dim: int, at: int) -> None:
    if not applies(case, shape) or (at in (0, shape[dim]) and case.id.startswith(BY_SIZE)):
        return
    start = values(shape, 1, wild=False)
    whole = one(case, start, backend)
    parts = [one(case, piece, backend) for piece in cut(start, dim, at)]
    stops = set()
    for t in range(STEPS):
        g = values(shape, 10 + t, wild=False)
        parameter(whole).grad = g
        for opt, piece in zip(parts, cut(g, dim, at), strict=True):
            parameter(opt).grad = piece.contiguous()
        whole.step()
        stops.add(step_together(parts, dim))
    assert len(stops) == 1
    close(torch.cat([parameter(opt).detach() for opt in parts], dim), parameter(whole).detach(), "parameter")
    for key, want in whole.state[parameter(whole)].items():
        found = [opt.state[parameter(opt)][key] for opt in parts]
        if want.ndim <= dim or want.shape[dim] == 1:
            for x in found:
                close(x, want, key)
        else:
            close(torch.cat(found, dim), want, key)


def close(got: torch.Tensor, want: torch.Tensor, what: str) -> None:
    assert difference(got, want) < (TOLERANCE if want.dtype == torch.float32 else LAST_BIT), what


@pytest.mark.parametrize("case", EVERY_REDUCING, ids=lambda c: c.id)
def test_a_step_that_stops_has_the_bits_of_one_that_does_not(case: Case, backend: str) -> None:
    check_same_bits(case, backend)


def check_same_bits(case: Case, backend: str) -> None:
    """Where nobody changes its sums; several tensors go from stop to stop together."""
    # Triton's interpreter takes one row after the other where a rule takes each by itself
    few = case.id == "tiger-rows"
    shapes = [(14 if few else 140, 150), (7, 5), (3, 4 if few else 20, 30)]
    opts = [
        case.make(
            [torch.nn.Parameter(values(s, i, wild=False)) for i, s in enumerate(shapes)], backend=backend
        )
        for _ in range(2)
    ]
    for t in range(STEPS):
        for opt in opts:
            for i, p in enumerate(opt.param_groups[0]["params"]):
                p.grad = values(p.shape, 10 * t + i, wild=False)
        opts[0].step()
        step_together(opts[1:], 0)
    for p, q in zip(*(opt.param_groups[0]["params"] for opt in opts), strict=True):
        assert torch.equal(p, q)
        for key, want in opts[0].state[p].items():
            assert torch.equal(opts[1].state[q][key], want), key


# parts of few and of many sums, in one turn of a group and in many; sums of one block and of several
SUMMED: list[dict[str, Any]] = [
    *(dict(sums=n, parts=parts, stride=n) for n, parts in ((1, 1), (600, 5), (300, 31), (2, 30))),
    *(dict(sums=n, parts=parts, stride=n) for n, parts in ((70, 33), (45, 2100), (1, 5000), (3, 257))),
    dict(sums=4, parts=0, stride=4),
    # columns of matrices, rows of them, more or fewer than there are column tiles
    dict(sums=150, run=50, run_stride=2000, parts=40, stride=50),
    dict(sums=20, run=4, run_stride=12, parts=3, stride=4),
    dict(sums=40, run=1, run_stride=9, parts=9, stride=1),
    dict(sums=3, run=1, run_stride=300, parts=300, stride=1, times=7, times_stride=900),
    dict(sums=3, run=1, run_stride=5, parts=5, stride=1, times=70, times_stride=15),
    dict(sums=40, run=1, run_stride=10, parts=10, stride=1, times=10, times_stride=400),
]
SMALLER_SUMS = [kind for kind in SUMMED if kind["sums"] < 300]
OF_STATES: list[dict[str, Any]] = [
    dict(sums=3, run=1, run_stride=100, parts=100, stride=1),
    dict(sums=30, run=1, run_stride=10, parts=10, stride=1),
    dict(sums=1, parts=300, stride=1),
]
READ = 100_000  # numbers that parts may be among


def prepared(
    opt: Any, without: Iterable[torch.nn.Parameter] = ()
) -> tuple[Any, ReducingRounds, torch.Tensor]:
    """In front of a pass: the executor of its parameters, all of one rule, and their addresses.

    without: whose gradients are gone.
    """
    give_gradients(parameters(opt), 1)
    plan = Plan(opt)
    assert plan._refresh(opt)
    for p in without:
        p.grad = None
    assert plan._refresh(opt)
    executor: Any
    (executor,) = plan._executors
    (rounds,) = reducing_rounds(executor._specs, executor._summed, executor.reduction)
    table = executor._selecting.table(executor._selecting.select(rounds.indices))
    return executor, rounds, rounds.tensors.addresses.send(table)


def added_up(one: Summation, parts: torch.Tensor) -> torch.Tensor:
    k, i, j = (torch.arange(n) for n in (one.sums, one.parts, one.times))
    first = one.first + k // one.run * one.run_stride + k % one.run
    at = first.view(-1, 1, 1) + (i * one.stride).view(-1, 1) + j * one.times_stride
    return parts[at].double().sum((1, 2))


def check_summations(backend: str, summed: list[dict[str, Any]] = SUMMED) -> None:
    """Of whole numbers, which have one sum in any order. What has no gradient counts as zeros."""
    params = [torch.nn.Parameter(values((300, 40), i, wild=False)) for i in range(2)]
    opt: Any = CASE["adafactor"].make(params, backend=backend)
    executor, rounds, addresses = prepared(opt, params[1:])
    states = [opt.state[p][executor._specs[0].state_names[0]] for p in params]
    for state in states:
        state.copy_(torch.randint(-1000, 1000, state.shape))
    numbers = torch.randint(-1000, 1000, (READ,)).double()
    found, to = [], READ
    for tensor, kinds in ((-1, summed), (0, OF_STATES), (1, OF_STATES)):
        for i, kind in enumerate(kinds):
            first = 0 if tensor >= 0 else 13 * i % 100
            found.append(Summation.of(to, first, **kind, tensor=tensor))
            to += found[-1].sums + 1
    scratch = torch.cat([numbers, torch.full((to - READ,), torch.nan)])
    want = scratch.clone()
    for one in found:
        parts = numbers if one.tensor < 0 else states[one.tensor].flatten()
        want[one.to : one.to + one.sums] = added_up(one, parts) if one.tensor < 1 else 0.0
    there = SimpleNamespace(
        tensors=SimpleNamespace(name="", formats=rounds.tensors.formats, scratch=scratch),
        indices=rounds.indices,
        summations=[Summations(found, scratch.device)],
    )
    executor.sum_parts(there, 0, addresses)
    assert torch.equal(scratch.nan_to_num(nan=-1e9), want.nan_to_num(nan=-1e9))


def test_sums_of_parts(cuda: Emulated) -> None:
    check_summations("cuda")


def test_sums_in_one_order(cuda: Emulated) -> None:
    """Whatever that of threads and blocks is."""
    params = [torch.nn.Parameter(values((9000, 40), 1, wild=False))]
    executor, rounds, addresses = prepared(CASE["adafactor"].make(params, backend="cuda"))
    numbers = torch.randn(rounds.tensors.scratch.shape, dtype=torch.float64)
    results = []
    for backwards in (False, True):
        cuda.native.machine().backwards = backwards
        rounds.tensors.scratch.copy_(numbers)
        executor.sum_parts(rounds, 0, addresses)
        results.append(rounds.tensors.scratch.clone())
    assert torch.equal(*results)


# many tiles of rows, of columns, several matrices, many chunks
STOPPING = {
    "adafactor": [(9000, 40), (3, 300, 280), (3, 9000), (7, 5), (0, 5), (5, 0)],
    "amos-rows": [(3, 20_000), (70, 40)],
    "amos-columns": [(9000, 40), (3, 70, 30)],
    "lamb": [(700_001,), (5,), (20, 30)],
}


def check_stops(case: Case, backend: str, shapes: list[tuple[int, ...]]) -> None:
    """Against torch's sums over the dimension of tiles, of chunks or of rows; nothing else is written."""
    params = [torch.nn.Parameter(values(shape, i, wild=False)) for i, shape in enumerate(shapes)]
    opt: Any = case.make(params, backend=backend)
    executor, rounds, addresses = prepared(opt)
    scratch = rounds.tensors.scratch
    scratch.copy_(torch.randint(-1000, 1000, scratch.shape))
    want = scratch.clone()

    def view(place: int, *shape: int) -> torch.Tensor:
        return want[place : place + torch.Size(shape).numel()].view(shape)

    along, sums = rounds.tensors.schedule.reduction.along, rounds.tensors.schedule.reduction.sums
    for k, g in enumerate(rounds.tensors.schedule.geometries):
        whole = dict(zip(FIELDS, rounds.whole[k].tolist(), strict=True))
        if along in ("rows", "both"):
            rows = view(g.row_sums, g.column_tiles, g.batch, g.rows)
            view(whole["row_sums"], g.batch, g.rows).copy_(rows.sum(0))
        if along in ("columns", "both"):
            columns = view(g.column_sums, g.batch, g.row_tiles, g.columns)
            view(whole["column_sums"], g.batch, g.columns).copy_(columns.sum(1))
        if along == "both":
            view(whole["matrix_sums"], g.batch).copy_(rows.sum((0, 2)))
            averages = opt.state[params[rounds.indices[k]]][executor._specs[k].state_names[0]]
            averages.copy_(torch.randint(-1000, 1000, averages.shape))
            of_rows = averages.double().view(g.batch, g.rows)
            view(whole["average_sums"], g.batch).copy_(of_rows.sum(1))
        view(whole["sums"], sums).copy_(view(g.sums, g.chunks, sums).sum(0))
    for which in range(2):
        if rounds.summations[which].blocks:
            executor.sum_parts(rounds, which, addresses)
    assert torch.equal(scratch, want)


@pytest.mark.parametrize("name", STOPPING)
def test_what_stands_at_a_stop(name: str, cuda: Emulated) -> None:
    check_stops(CASE[name], "cuda", STOPPING[name])


class Called(TorchDispatchMode):
    """Notes torch's operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("count", [1, 40])
def test_launches_of_a_step_that_stops(count: int, cuda: Emulated) -> None:
    """One adds up what all tensors of a list stop with."""
    shapes = [shape for _ in range(count) for shape in ((9, 8), (3, 4, 5), (7,))]
    params = [torch.nn.Parameter(values(shape, i, wild=False)) for i, shape in enumerate(shapes)]
    opt: Any = danlu.Adafactor(params, backend="cuda")
    give_gradients(params, 1)
    cuda.native.reset()
    with Called() as called:
        step_together([opt], 0)
    assert not [name for name in called.names if "sum" in name]
    # of matrices six passes and two stops, of vectors three and one
    assert len(cuda.native.machine().launches) == 6 + 2 + 3 + 1
