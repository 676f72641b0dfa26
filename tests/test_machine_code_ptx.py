"""What nvcc and Triton make of the kernels, executed: steps over CPU tensors through their PTX."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import danlu
import lazy_runs
import listed_rules
from cases import (
    BF16,
    CASES,
    EVERY_REDUCING,
    F16,
    F32,
    OFTEN,
    OTHER_LAYERED,
    STORAGES,
    Case,
    Storage,
    set_gradient,
    values,
)
from danlu.backends.triton_reduce import ReducingLaunches
from danlu.testing import same_bits
from layouts import Layout, Place, contiguous, permuted
from machine_code.executed import Executor
from norm_on_a_gpu import squares_of
from reductions import CASE, DOUBLE, KINDS, LAST_BIT, far, singles
from runs import assert_same, run
from test_rounds import SMALLER_SUMS, check_summations
from training import all_same, copies, everything, give_gradients, parameters
from wrapped import MAKERS, WRAPPERS, Wrapping

pytestmark = pytest.mark.usefixtures("one_thread")
CHUNK = 16384
STEPS = 3


def offset(elements: int) -> Place:
    """That many elements behind a multiple of 64 bytes; what lies before and behind is no tensor's."""

    def place(x: torch.Tensor) -> torch.Tensor:
        room = np.empty(x.numel() * x.element_size() + 128, np.uint8)
        first = -room.ctypes.data % 64 + elements * x.element_size()
        view = (
            torch.from_numpy(room[first : first + x.numel() * x.element_size()]).view(x.dtype).view(x.shape)
        )
        return view.copy_(x)

    return place


# tails, the ends of packs, turns and chunks; aligned all together, or one array alone not
ELEMENTWISE = [
    Layout("scalar", ()),
    Layout("tail", (7,)),
    Layout("empty", (0,)),
    Layout("matrix", (33, 65)),
    Layout("transposed", (40, 31), permuted(1, 0), permuted(1, 0)),
    Layout("two-chunks", (CHUNK + 9,)),
    Layout("chunk", (CHUNK,)),
    Layout("param-offset-1", (1023,), offset(1)),
    Layout("grad-offset-3", (1025,), contiguous, offset(3)),
    Layout("both-offset", (6, 171), offset(5), offset(2)),
    Layout("turns", (4097,), offset(8), offset(8)),
]
# tiles of one warp and of several, batches, rows and columns that end within packs and parts, odd addresses
REDUCING = [
    Layout("narrow", (67, 63)),
    Layout("few-rows", (63, 32)),
    Layout("tiles", (130, 264)),
    Layout("parts", (1030, 8)),
    Layout("long-odd-rows", (3, 2501)),
    Layout("many-small", (11, 5, 3, 3)),
    Layout("one-row", (1, 301)),
    Layout("batch", (2, 30, 70), offset(1), offset(3)),
    Layout("scalar", ()),
    Layout("vector", (700,)),
    Layout("vector-offset", (2053,), contiguous, offset(1)),
]
MATRICES = [layout for layout in REDUCING if len(layout.shape) > 1]
STORED = [storage for storage in STORAGES if storage.moment != F16]
BITS = STORAGES[3]  # bf16 throughout
# every rule in fp32 and bf16, one or another in everything else; what converts in Triton knows no rule
COMBINATIONS = [(case, storage) for case in CASES for storage in (STORAGES[0], BITS)]
OTHERS = [storage for storage in STORED if storage not in (STORAGES[0], BITS)]
COMBINATIONS += [(CASES[(0, 4)[i % 2]], storage) for i, storage in enumerate(OTHERS)]
EVERY = EVERY_REDUCING + OTHER_LAYERED
# whose rule is that of another, too
LIKE_ANOTHER = {"adafactor-optax", "adafactor-big-vision", "lamb-not-adapted", "amos", "amos-momentum"}
# tiles of other widths are kernels of their own: of each kind of statistic one rule has them all
EVERY_WIDTH = {"adafactor", "amos-rows", "amos-columns"}
COMPILED_16 = {"adafactor", "lamb"}  # by Triton, which compiles the others with --all
FEW = ("tiles", "batch", "scalar", "vector-offset")


def id_of(x: object) -> str | None:
    return x.id if isinstance(x, Case | Storage | Wrapping) else None


@pytest.fixture(autouse=True)
def _poisoned(poisoned_scratch: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does one of Triton's."""
    reduce = ReducingLaunches.run

    def reduce_poisoned(launches: ReducingLaunches, *arguments: object) -> None:
        launches._scratch.fill_(math.nan)
        reduce(launches, *arguments)

    monkeypatch.setattr(ReducingLaunches, "run", reduce_poisoned)


@pytest.mark.parametrize(
    ("executed", "case", "storage"),
    [
        pytest.param(
            backend,
            case,
            storage,
            id=f"{backend}-{case.id}-{storage.id}",
            marks=pytest.mark.full if left_out else (),
        )
        for backend in ("cuda", "triton")
        for case, storage in COMBINATIONS
        for left_out in [backend == "triton" and storage == BITS and case.id not in OFTEN]
    ],
    indirect=["executed"],
)
def test_the_bits_of_the_reference(case: Case, storage: Storage, executed: Executor) -> None:
    """Over special values, steps, two groups, and parameters that are at different steps."""
    how = dict(steps=STEPS, layouts=ELEMENTWISE)
    got = run(case, storage, executed.backend, **how)
    assert executed.names
    assert_same(got, run(case, storage, "reference", **how), ELEMENTWISE)


@pytest.mark.parametrize("case", CASES, ids=id_of)
def test_the_bits_of_ordinary_numbers(case: Case, executed: Executor) -> None:
    """Wild values soon make most elements NaN or infinite."""
    how = dict(steps=2, layouts=ELEMENTWISE[:7], wild=False)
    got = run(case, STORAGES[0], executed.backend, **how)
    assert_same(got, run(case, STORAGES[0], "reference", **how), ELEMENTWISE[:7])


@pytest.mark.parametrize("case", [CASES[0], CASES[4]], ids=id_of)
def test_coefficients_from_the_device(case: Case, executed: Executor) -> None:
    how = dict(steps=STEPS, layouts=ELEMENTWISE)
    got = run(case, STORAGES[0], executed.backend, capturable=True, **how)
    assert_same(got, run(case, STORAGES[0], "reference", **how), ELEMENTWISE)


@pytest.mark.parametrize("mode", lazy_runs.MODES)
def test_rows_of_lazy_tensors(mode: str, executed: Executor) -> None:
    shapes = [(50, 3), (7,), (40, 30), (1, 5), (5, 1), (0, 4), (20, 6, 5)]
    got, want = (
        lazy_runs.run(CASES[4], STORAGES[0], b, mode, shapes=shapes) for b in (executed.backend, "reference")
    )
    lazy_runs.assert_same(got, want, shapes)


def layouts_of(case: Case, backend: str = "cuda") -> list[Layout]:
    """Statistics along named dimensions take no vectors."""
    layouts = MATRICES if "reduce_dims" in case.hyper else REDUCING
    if backend == "triton" and case.id not in EVERY_WIDTH:
        layouts = [layout for layout in layouts if layout.id in FEW]
    return layouts


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=pytest.mark.full if case.id in LIKE_ANOTHER else ()) for case in EVERY],
    ids=id_of,
)
def test_close_to_float64(case: Case, executed: Executor) -> None:
    """All passes of rules that reduce, in order, from sums to the step."""
    layouts = layouts_of(case, executed.backend)
    got, want = (
        run(case, storage, backend, wild=False, steps=2, layouts=layouts)
        for storage, backend in ((STORAGES[0], executed.backend), (DOUBLE, "reference"))
    )
    assert not far(got, want, layouts)


def test_every_rule_is_among_these() -> None:
    names = {"accumulate", "average", "lookahead"}  # of what is done around a step
    for case in [*CASES, *(case for case in EVERY if case.id not in LIKE_ANOTHER)]:
        opt = case.make([torch.nn.Parameter(torch.ones(1, 1))])
        layouts = layouts_of(case) if case.reduces else ELEMENTWISE
        names |= {opt.rule(opt.param_groups[0], layout.shape) for layout in layouts}
    assert names == {rule.name for rule in listed_rules.ELEMENT_WISE + listed_rules.REDUCING}


@pytest.mark.parametrize(
    ("executed", "case"),
    [
        pytest.param(
            backend,
            case,
            id=f"{backend}-{case.id}",
            marks=() if case.id in (COMPILED_16 if backend == "triton" else KINDS) else pytest.mark.full,
        )
        for backend in ("cuda", "triton")
        for case in EVERY
    ],
    indirect=["executed"],
)
def test_16_bits(case: Case, executed: Executor) -> None:
    """One step from the same numbers: what is stored differs by the last bit of 16 at most."""
    layouts = [layout for layout in layouts_of(case) if layout.id in ("tiles", "batch", "vector")]
    got, want = (
        run(case, Storage(BF16, BF16, F32), backend, wild=False, steps=1, layouts=layouts)
        for backend in (executed.backend, "reference")
    )
    assert not far(got, want, layouts, LAST_BIT)
    assert not far(singles(got), singles(want), layouts)


@pytest.mark.parametrize("storage", [STORAGES[0], BITS], ids=id_of)
def test_clipped(storage: Storage, executed: Executor) -> None:
    """By the norm over gradients of several sizes, at any address; and the step that follows from it."""
    results = []
    for backend in (executed.backend, "reference"):
        params = [
            layout.param(values(layout.shape, i, wild=False).to(storage.param))
            for i, layout in enumerate(ELEMENTWISE)
        ]
        params = [torch.nn.Parameter(p) for p in params]
        opt = danlu.AdamW(params, lr=1e-2, max_grad_norm=0.7, backend=backend, state_dtype=storage.moment)
        for t in range(2):
            for i, (layout, p) in enumerate(zip(ELEMENTWISE, params, strict=True)):
                set_gradient(p, layout.grad(values(layout.shape, 100 * t + i, wild=False).to(storage.grad)))
            opt.step()
        results.append([{"param": p.detach(), **opt.state[p]} for p in params])
        if backend == executed.backend:
            assert opt._plan is not None
            squares = opt._plan._executors[0]._norm[0].item()  # type: ignore[attr-defined]
            assert squares == pytest.approx(squares_of([p.grad for p in params]), rel=1e-14)
    assert not far(*results, ELEMENTWISE, 1e-6 if storage.param == F32 else LAST_BIT)


def test_sums_where_a_step_stops(executed: Executor) -> None:
    check_summations(executed.backend, SMALLER_SUMS)
    assert [name for name in executed.names if "sum_parts" in name]


@pytest.mark.parametrize("case", [CASE["lamb"], CASES[4]], ids=id_of)
def test_found_inf_touches_nothing(case: Case, executed: Executor) -> None:
    params = [torch.nn.Parameter(values((33, 65), 1, wild=False))]
    opt = case.make(params, backend=executed.backend, capturable=True)
    give_gradients(parameters(opt), 0)
    opt.step()
    before = copies(opt)
    for found, stays in ((1.0, True), (0.0, False)):
        opt.found_inf = torch.tensor([found])  # type: ignore[attr-defined]
        opt.step()
        assert all_same(everything(opt), before) == stays


@pytest.mark.parametrize("wrapping", WRAPPERS, ids=id_of)
def test_what_is_done_around_a_step(wrapping: Wrapping, executed: Executor) -> None:
    """Accumulation, Lookahead, EMA, and all three."""
    results = []
    for backend in (executed.backend, "reference"):
        params = [
            torch.nn.Parameter(layout.param(values(layout.shape, i))) for i, layout in enumerate(ELEMENTWISE)
        ]
        groups = [{"params": params[::2]}, {"params": params[1::2], "lr": 1e-2, "maximize": True}]
        opt = wrapping.make(MAKERS["adamw"](groups, backend=backend))
        for t in range(wrapping.period + 1):
            for i, (layout, p) in enumerate(zip(ELEMENTWISE, params, strict=True)):
                p.grad = None if (t + i) % 5 == 4 else layout.grad(values(layout.shape, 50 * (t + 1) + i))
            opt.step()
        results.append(everything(opt))
    assert all(map(same_bits, *results))
