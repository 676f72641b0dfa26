"""Native kernels of rules that reduce: close to float64, and the same bits from run to run."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch

import danlu
from cases import EVERY_REDUCING, F32, F64, REDUCING, STORAGES, Case, Storage, set_gradient, values
from danlu import _cpu
from danlu.testing import same_bits
from layouts import LAYOUTS, Layout, offset
from reductions import KINDS, every_kind
from runs import Result, run

INSTRUCTION_SETS = _cpu.instruction_sets()
# one block of columns and several, tiles in both directions, narrow rows, batches, long rows and columns
MATRICES = [
    Layout("wide", (5, 3000)),
    Layout("high", (3000, 5)),
    Layout("tiles", (700, 1300)),
    Layout("narrow-tiles", (2100, 65)),
    Layout("widest", (130, 17000)),
    Layout("batch", (3, 150, 260)),
    Layout("batches", (2, 3, 20, 30), offset(1), offset(3)),
    Layout("row", (1, 140000)),
    Layout("column", (1500, 1)),
    Layout("shared", (2100, 2000)),
]
DOUBLE = Storage(F64, F64, F32)
STEPS = 10
# Normwise, after as many steps. fp32: what one rounding of a parameter a step leaves. 16 bits: a result that
# lies between two of them may take the other one.
TOLERANCE = {2: 3e-3, 4: 1e-6}

by_id = functools.partial(pytest.mark.parametrize, ids=lambda c: c.id)
# formulas that share their storage with another's; with --all every one
OFTEN = [
    case
    if case.id in (*KINDS, "adafactor-torch", "tiger-matrix", "amos-momentum", "layer-adamw")
    else pytest.param(case, marks=pytest.mark.full)
    for case in REDUCING
]


def difference(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-30)).item()


def assert_close(got: Result, want: Result, layouts: list[Layout]) -> None:
    far = [
        (layout.id, key, difference(a[key], b[key]))
        for layout, a, b in zip(layouts, got, want, strict=True)
        for key in b
        if not difference(a[key], b[key]) < TOLERANCE[a[key].element_size()] and b[key].numel()
    ]
    assert not far


@functools.cache
def oracle(case_id: str) -> Result:
    case = next(c for c in EVERY_REDUCING if c.id == case_id)
    return run(case, DOUBLE, "reference", wild=False, steps=STEPS)


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
@by_id("case", REDUCING)
def test_close_to_float64(case: Case, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DANLU_CPU_ISA", isa)
    assert_close(run(case, STORAGES[0], "cpu", wild=False, steps=STEPS), oracle(case.id), LAYOUTS)


@every_kind
def test_close_to_float64_in_tiles(case: Case) -> None:
    got, want = (
        run(case, storage, backend, wild=False, steps=2, layouts=MATRICES)
        for storage, backend in ((STORAGES[0], "cpu"), (DOUBLE, "reference"))
    )
    assert_close(got, want, MATRICES)


@pytest.mark.pairs
@pytest.mark.parametrize("backend", ["cpu", "cuda"], indirect=True)
@by_id("storage", STORAGES[1:])
@by_id("case", OFTEN)
def test_close_to_the_reference_in_16_bits(case: Case, storage: Storage, backend: str) -> None:
    got, want = (run(case, storage, b, wild=False, steps=3) for b in (backend, "reference"))
    assert_close(got, want, LAYOUTS)


@every_kind
def test_the_same_bits_for_any_threads_and_instruction_set(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for isa in INSTRUCTION_SETS:
        monkeypatch.setenv("DANLU_CPU_ISA", isa)
        for threads in (1, 2, 5) if isa == INSTRUCTION_SETS[0] else (5,):
            torch.set_num_threads(threads)
            results.append(run(case, STORAGES[0], "cpu", wild=False, steps=2, layouts=MATRICES))
    for other in results[1:]:
        for layout, a, b in zip(MATRICES, results[0], other, strict=True):
            assert all(same_bits(a[key], b[key]) for key in a), layout.id


def test_the_same_bits_in_four_runs() -> None:
    torch.set_num_threads(5)
    first, *others = (
        run(REDUCING[0], STORAGES[0], "cpu", wild=False, steps=2, layouts=MATRICES) for _ in range(4)
    )
    for other in others:
        assert all(same_bits(a[key], b[key]) for a, b in zip(first, other, strict=True) for key in a)


def test_many_large_tensors_at_once() -> None:
    """Threads that wait for a core are still in one tensor while others are two tensors ahead."""
    torch.set_num_threads(16)
    params = [torch.nn.Parameter(values((1100, 1000), i, wild=False) * 4.0**i) for i in range(8)]
    alone = [torch.nn.Parameter(p.detach().clone()) for p in params]
    together = danlu.Adafactor(params, lr=0.1)
    singly = [danlu.Adafactor([p], lr=0.1) for p in alone]
    for t in range(10):
        for p, q in zip(params, alone, strict=True):
            p.grad = q.grad = values((1100, 1000), t, wild=False)
        together.step()
        for one in singly:
            one.step()
        assert all(same_bits(p.detach(), q.detach()) for p, q in zip(params, alone, strict=True)), t


@by_id("case", REDUCING)
def test_who_takes_what(case: Case) -> None:
    """Rows and columns need memory in their order; sums over whole tensors do not."""
    layouts = LAYOUTS + MATRICES
    params = [torch.nn.Parameter(layout.param(values(layout.shape, 0, wild=False))) for layout in layouts]
    opt = case.make(params)
    for layout, p in zip(layouts, params, strict=True):
        set_gradient(p, layout.grad(values(layout.shape, 1, wild=False)))
    for layout, p, row in zip(layouts, params, opt.backend_report(), strict=True):
        matrix = opt.matrix(opt.param_groups[0], layout.shape)
        native = layout.native and matrix is not None
        if native and matrix[:2] != (1, 1):
            native = p.is_contiguous()
        assert row.backend == ("cpu" if native else "reference"), layout.id


@pytest.mark.parametrize("reduce_dims", [(0,), (1,), (-1,), (0, 1), (1, 2), (0, 2), (0, 1, 2), ()])
@pytest.mark.parametrize("momentum", [None, 0.9])
def test_amos_over_any_dimensions(reduce_dims: tuple[int, ...], momentum: float | None) -> None:
    hyper = dict(lr=2e-2, eta=0.5, reduce_dims=reduce_dims, momentum=momentum)
    case = Case("amos", danlu.Amos, hyper)
    layouts = [Layout("small", (3, 5, 7)), Layout("tiles", (3, 300, 700)), Layout("one", (1, 4000, 1))]
    assert case.make([torch.zeros(layouts[1].shape)]).backend_report()[0].backend == (
        "reference" if reduce_dims == (0, 2) else "cpu"
    )
    got = run(case, STORAGES[0], "cpu", wild=False, layouts=layouts)
    assert_close(got, run(case, DOUBLE, "reference", wild=False, layouts=layouts), layouts)


SCALES = [0.0, 1e-38, 1e-20, 1e-3, 1e10, 1e19, 3e37]


@pytest.mark.pairs
@pytest.mark.parametrize("preset", ["huggingface", "torch", "optax", "big_vision", "bert4keras"])
@pytest.mark.parametrize("scale", SCALES)
def test_adafactor_never_makes_nan_of_finite_gradients(preset: str, backend: str, scale: float) -> None:
    """Products of row and column averages underflow at small gradients, and overflow at large ones."""
    lr: dict[str, Any] = dict(lr=1e-2) if preset == "big_vision" else {}
    shapes = [(), (1,), (9,), (1, 9), (9, 1), (130, 140), (3, 130, 140)]
    params = [torch.nn.Parameter(values(shape, 1, wild=False)) for shape in shapes]
    opt = danlu.Adafactor(params, preset=preset, backend=backend, **lr)
    for t in range(5):
        for i, p in enumerate(params):
            p.grad = values(p.shape, 10 * t + i, wild=False).clamp(-3, 3) * scale
            if p.ndim > 1:
                p.grad[..., 0, :] = 0.0
                p.grad[..., 0] = 0.0
        opt.step()
        for p in params:
            assert p.isfinite().all()
            assert all(state.isfinite().all() for state in opt.state[p].values())


@pytest.mark.pairs
@by_id("case", REDUCING)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_shows(case: Case, backend: str, bad: float) -> None:
    p = torch.nn.Parameter(values((140, 150), 0, wild=False))
    opt = case.make([p], backend=backend)
    for _ in range(3):
        p.grad = values(p.shape, 1, wild=False)
        if case.hyper.get("clip_value") is None or bad != bad:
            p.grad[3, 5] = bad
        else:
            p.grad[3, 5] = 1.0
        opt.step()
    clipped = case.hyper.get("clip_value") is not None and bad == bad
    assert bool(p[3, 5].isfinite()) == (
        clipped or (case.optimizer in (danlu.Lion, danlu.Tiger) and bad == bad)
    )


@by_id("case", REDUCING)
def test_zero_parameters_and_zero_gradients(case: Case, backend: str) -> None:
    for start, gradient in ((0.0, 1.0), (1.0, 0.0), (0.0, 0.0)):
        params = [torch.nn.Parameter(torch.full(shape, start)) for shape in ((6,), (40, 50))]
        opt = case.make(params, backend=backend)
        for _ in range(3):
            for p in params:
                p.grad = torch.full_like(p, gradient)
            opt.step()
        assert all(p.isfinite().all() for p in params)
        if start == gradient == 0.0:
            assert all((p == 0).all() for p in params)


def test_a_state_of_another_shape_is_refused(backend: str) -> None:
    p = torch.nn.Parameter(torch.ones(4, 5))
    p.grad = torch.ones(4, 5)
    opt = danlu.Adafactor([("weight", p)], lr=0.1, backend=backend)
    opt.step()
    opt.state[p]["row_var"] = torch.ones(4)
    before = p.detach().clone()
    with pytest.raises(ValueError, match=r"weight: state 'row_var' has shape \(4,\).*needs \(4, 1\)"):
        opt.step()
    assert same_bits(p.detach(), before)


@pytest.mark.parametrize("threads", [1, 2])
def test_scratch_is_a_small_part_of_a_tensor(threads: int) -> None:
    p = torch.nn.Parameter(torch.zeros(4000, 4000))
    p.grad = torch.zeros(4000, 4000)
    opt = danlu.Adafactor([p], lr=0.1)
    opt.step()
    assert opt._plan is not None
    (executor,) = opt._plan._executors
    assert executor._native.scratch_bytes(threads) < 0.02 * p.nbytes  # type: ignore[attr-defined]
