"""Triton's kernels of rules that reduce, interpreted: close to float64, and the same bits always."""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from test_triton_bits import placed

import danlu
from cases import EVERY_REDUCING, F32, F64, OTHER_LAYERED, STORAGES, Case, Storage, values
from danlu.backends import triton as backend
from danlu.backends.triton import TritonExecutor
from danlu.backends.triton_reduce import ReducingLaunches
from danlu.schedule import CHUNK_SIZE, WANTED_ROW_TILES
from danlu.testing import same_bits
from danlu.triton_kernels.reduce.factors import wraps
from layouts import Layout, offset
from runs import Result, run
from test_reducing import assert_close
from training import all_same, check_found_inf, everything, give_gradients, parameters

# several chunks, tiles and parts in both directions; tiles of one warp and of eight, of 1 to 32 lanes; chunks
# that begin inside a row and inside a matrix
MATRICES = [
    Layout("tiles", (130, 300)),
    Layout("wide", (5, 700)),
    Layout("high", (600, 5)),
    Layout("one-warp", (40, 20)),
    Layout("batch", (3, 60, 130)),
    Layout("batches", (11, 3, 9), offset(1), offset(3)),
    Layout("row", (1, 17000)),
    Layout("column", (1500, 1), offset(4), offset(8)),
    Layout("even", (24, 200), offset(8)),
    Layout("one", (1, 1)),
    Layout("empty", (0, 4)),
]
# for rules that take each row by itself, which the interpreter does one after the other
ROWS = [
    Layout("narrow", (5, 20)),
    Layout("wide", (3, 700)),
    Layout("batch", (2, 3, 130)),
    Layout("batches", (4, 3, 9), offset(1), offset(3)),
    Layout("row", (1, 17000)),
    Layout("column", (9, 1), offset(4), offset(8)),
    Layout("even", (3, 200), offset(8)),
    Layout("one", (1, 1)),
    Layout("empty", (0, 4)),
]
DOUBLE = Storage(F64, F64, F32)
STEPS = 2

CASE = {case.id: case for case in EVERY_REDUCING}

# one of each kind: what is summed along and how often, with momentum and without
KINDS = [
    CASE[name] for name in ("adafactor-root-momentum", "lamb", "tiger-rows", "amos-rows", "amos-columns")
]

# each of them is executed as it is compiled, too, which is faster (test_machine_code_ptx.py)
every_case = pytest.mark.parametrize(
    "case",
    [case if case in KINDS else pytest.param(case, marks=pytest.mark.full) for case in EVERY_REDUCING],
    ids=lambda c: c.id,
)
each_kind = pytest.mark.parametrize("case", KINDS, ids=lambda c: c.id)


def of_each_kind(*names: str) -> pytest.MarkDecorator:
    """The others with --all."""
    cases = [case if case.id in names else pytest.param(case, marks=pytest.mark.full) for case in KINDS]
    return pytest.mark.parametrize("case", cases, ids=lambda c: c.id)


COMPILED_16 = ("adafactor-root-momentum", "lamb")  # whose passes test_machine_code_ptx.py executes in 16 bits


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pass reads what no pass of its step has written."""
    run_all = ReducingLaunches.run

    def run_poisoned(launches: ReducingLaunches, *arguments: Any) -> None:
        launches.tensors.scratch.fill_(0xFF)  # NaN in float32 and in float64
        run_all(launches, *arguments)

    monkeypatch.setattr(ReducingLaunches, "run", run_poisoned)


def layouts(case: Case) -> list[Layout]:
    return ROWS if case.id == "tiger-rows" else MATRICES


def few(case: Case) -> list[Layout]:
    """One of several tiles, a batch, and one at another offset."""
    return [layout for layout in layouts(case) if layout.id in ("tiles", "narrow", "batch", "batches")]


@functools.cache
def on_triton(case_id: str) -> Result:
    case = CASE[case_id]
    return run(case, STORAGES[0], "triton", wild=False, steps=STEPS, layouts=layouts(case))


def assert_same_bits(got: Result, want: Result) -> None:
    for a, b in zip(got, want, strict=True):
        assert all(same_bits(a[key], b[key]) for key in b)


@every_case
def test_close_to_float64(case: Case) -> None:
    want = run(case, DOUBLE, "reference", wild=False, steps=STEPS, layouts=layouts(case))
    assert_close(on_triton(case.id), want, layouts(case))


@pytest.mark.parametrize(
    ("case", "storage"),
    [
        pytest.param(
            case, storage, marks=() if case in KINDS and case.id not in COMPILED_16 else pytest.mark.full
        )
        for cases, formats in ((EVERY_REDUCING, STORAGES[1:]), (OTHER_LAYERED, STORAGES))
        for case, storage in zip(cases, itertools.cycle(formats), strict=False)
    ],
    ids=lambda x: x.id,
)
def test_close_to_the_reference_in_16_bits(case: Case, storage: Storage) -> None:
    got, want = (
        run(case, storage, b, wild=False, steps=2, layouts=few(case)) for b in ("triton", "reference")
    )
    assert_close(got, want, few(case))


@of_each_kind("adafactor-root-momentum", "lamb", "tiger-rows")
def test_the_same_bits_again_and_with_coefficients_from_the_device(case: Case) -> None:
    for engine in (dict(), dict(capturable=True)):
        got = run(case, STORAGES[0], "triton", wild=False, steps=STEPS, layouts=layouts(case), **engine)
        if engine:  # made of fp32 numbers on the device
            assert_close(got, on_triton(case.id), layouts(case))
        else:
            assert_same_bits(got, on_triton(case.id))


def launches_of(opt: danlu.FusedOptimizer) -> list[ReducingLaunches]:
    assert opt._plan is not None
    (executor,) = opt._plan._executors
    assert isinstance(executor, TritonExecutor)
    return [launch for launch in executor.launches if isinstance(launch, ReducingLaunches)]


@of_each_kind("adafactor-root-momentum", "tiger-rows", "amos-columns")
def test_the_same_bits_in_several_groups(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of them reuses the scratch of the one before."""
    bytes_of_group = 20000.0
    monkeypatch.setattr(backend, "group_bytes", lambda device: bytes_of_group)
    got = run(case, STORAGES[0], "triton", wild=False, steps=STEPS, layouts=layouts(case))
    assert_same_bits(got, on_triton(case.id))


def test_groups_and_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    def launched(shapes: list[tuple[int, ...]], group_bytes: float) -> list[str]:
        monkeypatch.setattr(backend, "group_bytes", lambda device: group_bytes)
        params = [torch.nn.Parameter(torch.ones(shape)) for shape in shapes]
        opt = danlu.Adafactor(params, lr=0.1, backend="triton")
        give_gradients(parameters(opt), 0)
        opt.step()
        (launches,) = launches_of(opt)
        return [call.launch.kernel for call in launches._calls]

    passes = ["reduce_gradient", "update_factors", "update_row_factors", "reduce_norms", "finalize", "apply"]
    assert launched([(3, 260), (4, 270)], math.inf) == passes
    assert launched([(3, 260), (4, 270)], 1.0) == 2 * passes
    assert launched([(3, 260), (4, 5), (3, 290)], math.inf) == [
        "reduce_gradient",
        *passes,
    ]  # one for each width


@pytest.mark.parametrize("name", ["amos-columns", pytest.param("adafactor", marks=pytest.mark.full)])
def test_tiles_of_several_batches_of_rows(name: str) -> None:
    """Those of a matrix that has too many rows for one batch of rows a tile."""
    longest = [Layout("longest", (2048 * WANTED_ROW_TILES + 5000, 1))]
    got = run(CASE[name], STORAGES[0], "triton", wild=False, steps=1, layouts=longest)
    want = run(CASE[name], DOUBLE, "reference", wild=False, steps=1, layouts=longest)
    assert_close(got, want, longest)


def test_parameters_are_measured_only_for_their_scale() -> None:
    """A NaN shows where it was read."""
    for scaled in (False, True):
        p = torch.nn.Parameter(torch.full((24, 200), math.nan))
        p.grad = torch.ones_like(p)
        opt = danlu.Adafactor([p], lr=0.1, scale_parameter=scaled, backend="triton")
        opt.step()
        (launches,) = launches_of(opt)
        place = launches.tensors.schedule.geometries[0].sums
        assert launches.tensors.scratch.view(F64)[place].isnan() == scaled


@pytest.mark.parametrize("case", [CASE["adafactor"], CASE["lamb"], CASE["tiger-rows"]], ids=lambda c: c.id)
def test_what_lies_around_stays(case: Case) -> None:
    for shape in ((9, 33), (6 if case.id == "tiger-rows" else 70, 260)):
        for shift in (0, 1, 8):
            p, room = placed(values(shape, 0, wild=False).flatten(), shift)
            before = room.clone()
            param = torch.nn.Parameter(p.view(shape))
            param.grad = values(shape, 1, wild=False)
            case.make([param], backend="triton").step()
            changed = (room != before).nonzero().flatten()
            first = p.storage_offset()
            assert (changed.min(), changed.max()) == (first, first + p.numel() - 1)


def some_matrices() -> list[torch.nn.Parameter]:
    shapes = [(4, 5), (9, 20), (3, 4, 6)]
    return [torch.nn.Parameter(values(shape, i, wild=False)) for i, shape in enumerate(shapes)]


@each_kind
def test_parameters_without_a_gradient_stay(case: Case) -> None:
    opt = case.make(some_matrices(), backend="triton")
    alone = [case.make([p], backend="triton") for p in some_matrices()]
    for t in range(4):
        params = parameters(opt)
        give_gradients(params, t)
        params[t % 3].grad = None
        opt.step()
        for p, one in zip(params, alone, strict=True):
            parameters(one)[0].grad = p.grad
            one.step()
    assert all_same(everything(opt), [t for one in alone for t in everything(one)])


@each_kind
def test_found_inf_touches_nothing(case: Case) -> None:
    check_found_inf(case.make(some_matrices(), backend="triton", capturable=True))


@triton.jit
def count_wraps(out, first, period, COUNT: tl.constexpr):  # noqa: N803
    offsets = tl.arange(0, COUNT)
    tl.store(out + offsets, wraps(offsets, tl.load(first), tl.load(period)))


def test_positions_are_exact() -> None:
    """Of every element of a chunk, for rows of every kind of length."""
    offsets = torch.arange(CHUNK_SIZE)
    for period in [1, 2, 3, 5, 7, 127, 128, 129, 1000, 5461, 8191, 16383, 16384, 16385, 50257, 2**40 + 1]:
        for first in {0, period // 2, period - 1}:
            got = torch.empty(CHUNK_SIZE, dtype=torch.int32)
            count_wraps[(1,)](got, torch.tensor([first]), torch.tensor([period]), CHUNK_SIZE)
            assert bool((got == (first + offsets) // period).all()), (period, first)


def test_the_usual_dtypes_of_statistics() -> None:
    (p,) = params = [torch.nn.Parameter(torch.ones(20, 30, dtype=torch.bfloat16))]
    opt = danlu.Adafactor(params, lr=0.1, backend="triton")
    p.grad = torch.ones_like(p)
    opt.step()
    (launches,) = launches_of(opt)
    assert launches.tensors.formats == ("bfloat16", "bfloat16", "float32", "float32")
    assert opt.state[p]["row_var"].dtype is F32
