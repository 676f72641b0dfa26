"""Lazy steps: rows that take no part stay as they are, the others move as without `danlu.Lazy`."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

import danlu
from cases import BF16, F16, F32, F64, REDUCING, STORAGES, Case, Storage, values
from danlu import _cpu, checks
from danlu.listed_rows import rows_taking_part, summed_rows
from danlu.testing import same_bits
from layouts import permuted
from lazy_runs import LAZY, MODES, assert_same, coo, dense, gradient, listed, run
from oracles.lazy_rows import PlainLazy

every_case = pytest.mark.parametrize("case", LAZY, ids=lambda c: c.id)
every_mode = pytest.mark.parametrize("mode", MODES)


EXPECTED: dict[tuple[str, Storage, str], list[dict[str, torch.Tensor]]] = {}


def expected(case: Case, storage: Storage, mode: str) -> list[dict[str, torch.Tensor]]:
    key = case.id, storage, mode
    if key not in EXPECTED:
        EXPECTED[key] = run(case, storage, "reference", mode)
    return EXPECTED[key]


@pytest.mark.pairs
@every_mode
@pytest.mark.parametrize("storage", STORAGES, ids=lambda s: s.id)
@every_case
def test_same_bits_as_the_reference(case: Case, storage: Storage, mode: str) -> None:
    torch.set_num_threads(3)
    assert_same(run(case, storage, "cpu", mode), expected(case, storage, mode))


@pytest.mark.pairs
@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("capturable", [False, True], ids=["host", "device"])
@every_mode
@every_case
def test_same_bits_of_cuda_kernels(case: Case, mode: str, capturable: bool) -> None:
    """With coefficients from the host, and with those computed by torch beside the counters."""
    storages = [storage for storage in STORAGES if storage.moment != F16]
    for storage in storages[:: len(storages) - 1] if capturable else storages:
        assert_same(run(case, storage, "cuda", mode, capturable=capturable), expected(case, storage, mode))


@every_mode
@pytest.mark.parametrize("isa", _cpu.instruction_sets())
def test_same_bits_with_every_instruction_set_and_thread_count(
    isa: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DANLU_CPU_ISA", isa)
    case = next(case for case in LAZY if case.id == "adamw")
    for threads, storage in enumerate(STORAGES, 1):
        torch.set_num_threads(threads)
        assert_same(run(case, storage, "cpu", mode), expected(case, storage, mode))


@pytest.mark.pairs
@every_mode
@every_case
@pytest.mark.parametrize("dtype", [F64, F32], ids=["reference-f64", "cpu-f32"])
def test_equals_the_formulas(case: Case, mode: str, dtype: torch.dtype) -> None:
    shape = (12, 3)
    p = torch.nn.Parameter(values(shape, 0, wild=False).to(dtype))
    inner = case.make([p])
    opt = danlu.Lazy(inner, mode)
    plain = PlainLazy(case.optimizer, p.detach(), mode, opt.param_groups[0])
    for t in range(8):
        p.grad = gradient(shape, 50 + t, 1 + t % 5, dtype, wild=False)
        rows, rows_values = rows_taking_part(p.grad)
        plain.step(dict(zip(rows.tolist(), rows_values.tolist(), strict=True)))
        opt.step()
    assert opt.state[p]["step"] == 8
    tolerance = 1e-14 if dtype == F64 else 2e-6
    for ours, theirs in zip((p, *list(opt.state[p].values())[:-1]), (plain.p, *plain.states), strict=True):
        assert (ours.double() - torch.tensor(theirs, dtype=F64)).abs().max() < tolerance
    assert {row.backend for row in opt.backend_report()} == {"reference" if dtype == F64 else "cpu"}


def test_equals_sparse_adam(backend: str) -> None:
    """Which adds eps to the uncorrected root of v, and so is equal where eps is nothing."""
    dtype = F64 if backend == "reference" else F32
    start = values((30, 4), 0, wild=False).to(dtype)
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    opt = danlu.Lazy(danlu.Adam([ours], lr=1e-2, betas=(0.8, 0.95), eps=1e-30, backend=backend))
    oracle = torch.optim.SparseAdam([theirs], lr=1e-2, betas=(0.8, 0.95), eps=1e-30)
    for t in range(20):
        ours.grad = listed((30, 4), t, dtype, wild=False)
        # a row of zeros that was never anything else is 0 / 0 in both
        ours.grad = coo(ours.grad._indices(), ours.grad._values() + 1e-3, (30, 4))
        theirs.grad = ours.grad.clone()
        opt.step()
        oracle.step()
    tolerance = 1e-15 if dtype == F64 else 1e-6
    assert (ours - theirs).abs().max() < tolerance * 10
    for key in ("exp_avg", "exp_avg_sq"):
        assert (opt.state[ours][key] - oracle.state[theirs][key]).abs().max() < tolerance


def test_equals_sparse_adam_with_its_epsilon() -> None:
    start = values((30, 4), 0, wild=False).double()
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    opt = danlu.Lazy(danlu.Adam([ours], lr=1e-2, betas=(0.8, 0.95)))
    oracle = torch.optim.SparseAdam([theirs], lr=1e-2, betas=(0.8, 0.95), eps=1e-3)
    for t in range(20):
        ours.grad = listed((30, 4), t, F64, wild=False)
        theirs.grad = ours.grad.clone()
        opt.param_groups[0]["eps"] = 1e-3 / (1 - 0.95 ** (t + 1)) ** 0.5
        opt.step()
        oracle.step()
    assert (ours - theirs).abs().max() < 1e-14


@every_case
@every_mode
def test_a_list_of_the_rows_that_are_not_zero_is_the_dense_gradient(
    case: Case, mode: str, backend: str
) -> None:
    results = []
    forms = ("dense", "coalesced", "uncoalesced", "strided values", "negated values", "strided indices")
    for form in (*forms, "marked wrongly"):
        p = torch.nn.Parameter(values((40, 6), 0, wild=False))
        opt = danlu.Lazy(case.make([p], backend=backend), mode)
        for t in range(4):
            g = dense((40, 6), t)
            rows, rows_values = rows_taking_part(g)
            order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(t))
            p.grad = {
                "dense": g,
                "coalesced": coo(rows, rows_values, g.shape, is_coalesced=True),
                "uncoalesced": coo(rows[order], rows_values[order], g.shape),
                "strided values": coo(rows, rows_values.t().contiguous().t(), g.shape, is_coalesced=True),
                "negated values": coo(rows, torch._neg_view(-rows_values), g.shape, is_coalesced=True),
                "strided indices": coo(
                    rows.repeat_interleave(2)[::2], rows_values, g.shape, is_coalesced=True
                ),
                "marked wrongly": coo(rows[order], rows_values[order], g.shape, is_coalesced=True),
            }[form]
            before = p.grad.clone() if form == "dense" else p.grad._values().clone()
            opt.step()
            assert same_bits(p.grad if form == "dense" else p.grad._values(), before)
        results.append([p.detach(), *opt.state[p].values()])
    for result in results[1:]:
        assert all(map(same_bits, result, results[0]))


@every_mode
def test_rows_that_are_listed_twice_are_summed(mode: str, backend: str) -> None:
    for flag in (False, True):  # True is not true
        p, q = (torch.nn.Parameter(torch.ones(4, 2)) for _ in range(2))
        entries = torch.tensor([[7.0, 8.0], [1.0, 2.0], [3.0, 4.0], [-5.0, 6.0]])
        # the second row lies beside the first in the parameter and in the list, and is listed again
        p.grad = coo([2, 3, 0, 3], entries, (4, 2), is_coalesced=flag)
        q.grad = torch.tensor([[3.0, 4.0], [0.0, 0.0], [7.0, 8.0], [-4.0, 8.0]])
        for x in (p, q):
            danlu.Lazy(danlu.AdamW([x], backend=backend), mode).step()
        assert same_bits(p, q)
        assert not p.grad.is_coalesced() or flag


@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16])
@pytest.mark.parametrize("shape", [(300, 40), (300,), (40, 2, 3), (40, 0)], ids=str)
def test_entries_of_a_row_are_summed_in_their_order(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    g = listed(shape, 3, dtype)
    sums: dict[int, torch.Tensor] = {}
    for row, entry in zip(g._indices()[0].tolist(), g._values(), strict=True):
        sums[row] = sums[row] + entry if row in sums else entry
    rows, rows_values = summed_rows(g)
    assert rows.tolist() == sorted(sums)
    assert same_bits(rows_values, torch.stack([sums[row] for row in sorted(sums)]))
    tame = listed(shape, 3, dtype, wild=False)
    rtol = {F64: 1e-14, F32: 1e-6, BF16: 2e-2, F16: 2e-3}[dtype]
    torch.testing.assert_close(summed_rows(tame).values, tame.coalesce()._values(), rtol=rtol, atol=rtol)


@pytest.mark.pairs
@every_case
@every_mode
def test_which_rows_take_part(case: Case, mode: str, backend: str) -> None:
    p = torch.nn.Parameter(torch.ones(6, 3))
    opt = danlu.Lazy(case.make([p], backend=backend), mode)
    first = values((6, 3), 1, wild=False)
    p.grad = first
    opt.step()
    state_of = {key: value.clone() for key, value in opt.state[p].items()}
    before = p.detach().clone()
    p.grad = torch.zeros(6, 3)
    p.grad[1, 2], p.grad[2, 0], p.grad[3, 1], p.grad[4] = 1e-45, float("nan"), -0.0, -0.0
    opt.step()
    moved = [not same_bits(p[i], before[i]) for i in range(6)]
    assert moved == [False, True, True, False, False, False]
    assert p[2, 0].isnan()
    assert not p[2, 1:].isnan().any()
    for key in opt.optimizer.state_names:
        changed = [not same_bits(opt.state[p][key][i], state_of[key][i]) for i in range(6)]
        assert changed == ([True] * 6 if mode == "params" else moved)
    assert opt.state[p]["step"] == 2


@pytest.mark.pairs
@every_case
@every_mode
def test_a_listed_row_of_zeros_takes_part(case: Case, mode: str, backend: str) -> None:
    p = torch.nn.Parameter(torch.ones(3, 2))
    opt = danlu.Lazy(case.make([p], backend=backend), mode)
    p.grad = values((3, 2), 1, wild=False)
    opt.step()
    before = p.detach().clone()
    p.grad = coo([1], torch.zeros(1, 2), (3, 2))
    opt.step()
    assert [same_bits(p[i], before[i]) for i in range(3)] == [True, False, True]


@every_mode
def test_every_gradient_counts_a_step(mode: str, backend: str) -> None:
    p = torch.nn.Parameter(torch.ones(3, 2))
    opt = danlu.Lazy(danlu.AdamW([p], backend=backend), mode)
    for g in (
        coo([], torch.zeros(0, 2), (3, 2)),
        torch.zeros(3, 2),
        None,
        coo([1], torch.ones(1, 2), (3, 2)),
    ):
        p.grad = g
        opt.step()
    assert opt.state[p]["step"] == 3
    assert same_bits(p[0], torch.ones(2))
    want = 0.01 * 1e-3 + 1e-3 * (0.1 / (1 - 0.9**3)) / ((0.001 / (1 - 0.999**3)) ** 0.5 + 1e-8)
    assert p[1, 0].item() == pytest.approx(1 - want, rel=1e-6)


@every_case
def test_params_mode_moves_the_moments_of_the_usual_step(case: Case, backend: str) -> None:
    """Where decay is no part of the gradient."""
    hyper = {"weight_decay": 0.0} if case.optimizer in (danlu.Adam, danlu.AdaX) else {}
    p, q = (torch.nn.Parameter(values((20, 4), 0, wild=False)) for _ in range(2))
    lazy = danlu.Lazy(case.make([p], backend=backend, **hyper), "params")
    usual = case.make([q], backend=backend, **hyper)
    for t in range(5):
        p.grad = dense((20, 4), t, wild=False)
        q.grad = p.grad.clone()
        before = p.detach().clone()
        lazy.step()
        usual.step()
        for key in lazy.optimizer.state_names:
            assert same_bits(lazy.state[p][key], usual.state[q][key])
        absent = p.grad.eq(0).all(1)
        assert same_bits(p[absent], before[absent])
        with torch.no_grad():
            q.copy_(p)


@every_mode
def test_absent_rows_are_not_read(mode: str) -> None:
    """NaN in their parameters reaches no moment, also where decay is part of the gradient."""
    for backend in ("cpu", "reference"):
        p = torch.nn.Parameter(torch.full((4, 3), float("nan")))
        with torch.no_grad():
            p[1] = 1.0
        opt = danlu.Lazy(danlu.Adam([p], weight_decay=0.1, backend=backend), mode)
        p.grad = coo([1], torch.ones(1, 3), (4, 3))
        opt.step()
        assert opt.state[p]["exp_avg"].isfinite().all()
        assert p[1].isfinite().all()


@every_mode
def test_clipping_and_scaling(mode: str, backend: str) -> None:
    """By the norm of the summed values, over lazy and ordinary parameters."""
    rows, rows_values = [5, 1, 5], values((3, 90_000), 1, wild=False)
    summed = torch.zeros(7, 90_000).index_add_(0, torch.tensor(rows), rows_values)
    bias = values((50,), 2, wild=False)
    norm = torch.cat([summed.flatten(), bias]).double().norm().item() / 4
    want = None
    for sparse in (True, False):
        p, b = torch.nn.Parameter(torch.zeros(7, 90_000)), torch.nn.Parameter(torch.zeros(50))
        groups = [{"params": [p], "lazy": True, "maximize": True}, {"params": [b], "lazy": False}]
        inner = danlu.AdamW(groups, max_grad_norm=2.0, backend=backend, betas=(0.0, 0.999))
        opt = danlu.Lazy(inner, mode)
        opt.grad_scale = torch.tensor(4.0)
        p.grad = coo(rows, rows_values, p.shape) if sparse else summed
        b.grad = bias
        opt.found_inf = torch.tensor(1.0)
        opt.step()
        assert not p.any()
        assert not opt.state
        opt.found_inf = torch.tensor(0.0)
        opt.step()
        scaled = opt.state[p]["exp_avg"]
        torch.testing.assert_close(scaled, -summed / 4 * (2.0 / norm), rtol=1e-6, atol=0)
        assert want is None or same_bits(want, scaled)
        want = scaled


@every_mode
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_the_norm_of_a_list_depends_on_neither_its_order_nor_the_threads(
    dtype: torch.dtype, mode: str
) -> None:
    """Nor on whether rows were summed before."""
    shapes = [(300, 40), (7,), (2, 140_001), (5, 5000)]
    lists = [listed(shape, i, dtype, wild=False) for i, shape in enumerate(shapes)]
    summed = [coo(*summed_rows(g), g.shape) for g in lists]
    assert all(len(a._values()) > len(b._values()) for a, b in zip(lists, summed, strict=True))
    results = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        for gradients in (lists, summed):
            params = [torch.nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in shapes]
            inner = danlu.AdamW(params, max_grad_norm=1.0, betas=(0.0, 0.999), state_dtype=F32)
            for p, g in zip(params, gradients, strict=True):
                p.grad = g
            danlu.Lazy(inner, mode).step()
            results.append([inner.state[p]["exp_avg"] for p in params])
    want = torch.cat([g.to_dense().double().flatten() for g in summed])
    got = torch.cat([moment.double().flatten() for moment in results[0]])
    torch.testing.assert_close(got, want / want.norm(), rtol=1e-6, atol=0)
    for result in results[1:]:
        assert all(map(same_bits, result, results[0]))


def not_contiguous(p: torch.Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(permuted(1, 0)(p))


@every_mode
@every_case
def test_rows_that_are_not_contiguous_take_the_reference(case: Case, mode: str) -> None:
    start = values((12, 5), 0, wild=False)
    p, q = not_contiguous(start), torch.nn.Parameter(start.clone())
    lazy = [danlu.Lazy(case.make([x]), mode) for x in (p, q)]
    for t in range(6):
        for x, opt in zip((p, q), lazy, strict=True):
            x.grad = gradient((12, 5), t, t % 6, F32, wild=False)
            opt.step()
    assert same_bits(p, q)
    (row,) = lazy[0].backend_report()
    assert row.backend == "reference"
    assert "not contiguous" in row.reason
    assert [row.backend for row in lazy[1].backend_report()] == ["cpu"]


# what a gradient may not be, for a parameter of shape (4, 3): (how it is made, error, words)
BAD = {
    "row too large": (
        lambda: coo([4], torch.ones(1, 3), (4, 3)),
        ValueError,
        "lists row 4, the parameter has 4 rows",
    ),
    "row below 0": (
        lambda: coo([2, -1], torch.ones(2, 3), (4, 3)),
        ValueError,
        "lists row -1, the parameter has 4 rows",
    ),
    "row far away": (lambda: coo([2**40], torch.ones(1, 3), (4, 3)), ValueError, "lists row 1099511627776"),
    "shape": (
        lambda: coo([1], torch.ones(1, 3), (5, 3)),
        ValueError,
        r"shape \(5, 3\), the parameter has \(4, 3\)",
    ),
    "elements": (lambda: torch.eye(4, 3).to_sparse(), TypeError, "sparse in 2 dimensions.*rows"),
}


@every_mode
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("planned", [False, True])
def test_a_bad_gradient_is_named_and_changes_nothing(
    bad: str, mode: str, backend: str, planned: bool
) -> None:
    make, error, words = BAD[bad]
    params = [torch.nn.Parameter(torch.ones(4, 3)) for _ in range(3)]
    opt = danlu.Lazy(
        danlu.AdamW([("a", params[0]), ("b", params[1]), ("c", params[2])], backend=backend), mode
    )
    for p in params:
        p.grad = coo([1], torch.ones(1, 3), (4, 3))
    if planned:
        opt.step()
    before = [copy.deepcopy((p.detach(), dict(opt.state.get(p, {})))) for p in params]
    if bad == "shape":
        params[1].data = torch.ones(5, 3)  # torch compares shapes when a gradient is assigned
    params[1].grad = None
    params[1].grad = make()
    if bad == "shape":
        params[1].data = torch.ones(4, 3)
        params[1].data.copy_(before[1][0])
    with pytest.raises(error, match=f"^b: .*{words}"):
        opt.step()
    for p, (old, state) in zip(params, before, strict=True):
        assert same_bits(p, old)
        assert opt.state.get(p, {}).keys() == state.keys()
        assert all(same_bits(opt.state[p][key], value) for key, value in state.items())
    params[1].grad = None
    opt.step()
    assert opt.state[params[0]]["step"] == 1 + planned


@pytest.mark.filterwarnings("ignore:Sparse CS. tensor support:UserWarning")
def test_other_sparse_layouts_are_named() -> None:
    """torch lets no such gradient be assigned so far."""
    p = torch.ones(4, 3)
    for g in (torch.eye(4, 3).to_sparse_csr(), torch.eye(4, 3).to_sparse_csc()):
        with pytest.raises(TypeError, match=f"^weight: the gradient has layout {g.layout}; danlu.Lazy takes"):
            checks.listed_rows("weight", p, g)


@every_mode
def test_other_errors_name_the_parameter(mode: str, backend: str) -> None:
    scalar = torch.nn.Parameter(torch.tensor(1.0))
    opt = danlu.Lazy(danlu.Lion([("scale", scalar)], backend=backend), mode)
    scalar.grad = torch.tensor(1.0)
    with pytest.raises(ValueError, match=r"^scale: .*0 dimensions"):
        opt.step()
    table = torch.nn.Parameter(torch.ones(4, 3))
    groups = [{"params": [("table", table)], "lazy": False}, {"params": [("scale", scalar)], "lazy": False}]
    opt = danlu.Lazy(danlu.Lion(groups, backend=backend), mode)
    table.grad = coo([1], torch.ones(1, 3), (4, 3))
    with pytest.raises(TypeError, match=r"^table: the gradient is sparse.*danlu\.Lazy"):
        opt.step()
    table.grad = None
    opt.step()  # an ordinary parameter may have no dimension
    assert scalar != 1


@every_mode
def test_the_dtype_of_a_listed_gradient_may_change(mode: str, backend: str) -> None:
    p = torch.nn.Parameter(torch.zeros(4, 3, dtype=BF16))
    opt = danlu.Lazy(danlu.Tiger([p], beta=0.0, backend=backend), mode)
    for dtype in (F32, BF16, F16, F32):
        p.grad = None
        p.grad_dtype = dtype
        p.grad = coo([2, 1], torch.tensor([[1.5] * 3, [-2.5] * 3], dtype=dtype), (4, 3))
        opt.step()
        assert opt.state[p]["exp_avg"][1:3, 0].tolist() == [-2.5, 1.5]
    assert [row.backend for row in opt.backend_report()] == [backend]


def test_which_groups_are_lazy(backend: str) -> None:
    def moved(*keys: dict[str, bool], change: Callable[[Any], None] = lambda opt: None) -> list[bool]:
        params = [torch.nn.Parameter(torch.ones(2, 2)) for _ in keys]
        groups = [{"params": [p], **key} for p, key in zip(params, keys, strict=True)]
        opt = danlu.Lazy(danlu.Lion(groups, lr=0.1, weight_decay=1.0, backend=backend))
        for _ in range(2):
            for p in params:
                p.data.fill_(1.0)
                p.grad = torch.tensor([[1.0, 1.0], [0.0, 0.0]])
            opt.step()
            change(opt)
        return [not same_bits(p[1], torch.ones(2)) for p in params]

    lazy, usual, unsaid = {"lazy": True}, {"lazy": False}, {}
    assert moved(unsaid, unsaid) == [False, False]
    assert moved(lazy, unsaid, usual) == [False, True, True]
    assert moved(unsaid, usual) == [True, True]

    def flip(opt: danlu.Lazy) -> None:
        opt.param_groups[0]["lazy"] = not opt.param_groups[0].get("lazy", True)

    assert moved(lazy, usual, change=flip) == [True, True]
    assert moved(usual, usual, change=flip) == [False, True]
    assert moved(unsaid, unsaid, change=flip) == [True, True]


class NotDanlu(torch.optim.SGD):
    pass


def tensors() -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.ones(4, 3))]


REFUSED: dict[str, tuple[Callable[[], Any], str, str]] = {
    "torch": (lambda: torch.optim.SGD(tensors()), "rows", "optimizer must be a danlu optimizer, got torch"),
    "adapted rows": (
        lambda: danlu.LayerAdaptation(danlu.Lion(tensors())),
        "rows",
        r"LayerAdaptation sums.*rows; Lazy\(LayerAdaptation\(optimizer\), mode='params'\)",
    ),
    "tiger": (lambda: danlu.Tiger(tensors(), accumulation_steps=2), "rows", "accumulation_steps must be 1"),
    **{
        f"{case.id} {mode}": (
            lambda case=case: case.make(tensors()),
            mode,
            f"optimizer must have.*{case.optimizer.__name__} sums",
        )
        for case in REDUCING
        if not case.adapted
        for mode in MODES
    },
}


@pytest.mark.parametrize("name", REFUSED)
def test_optimizers_that_cannot_be_lazy(name: str) -> None:
    make, mode, words = REFUSED[name]
    with pytest.raises(TypeError, match=words):
        danlu.Lazy(make(), mode)


def test_groups_that_cannot_be_lazy_raise_at_the_next_step() -> None:
    (p,) = tensors()
    opt = danlu.Lazy(danlu.Tiger([p]))
    p.grad = torch.ones(4, 3)
    opt.step()
    opt.param_groups[0]["accumulation_steps"] = 2
    before = p.detach().clone()
    with pytest.raises(TypeError, match="accumulation_steps must be 1"):
        opt.step()
    assert same_bits(p, before)
    with pytest.raises(ValueError, match="mode must be one of 'rows', 'params', got 'row'"):
        danlu.Lazy(danlu.Lion(tensors()), "row")


@every_mode
def test_checkpoints_in_the_middle(mode: str, backend: str) -> None:
    def made() -> tuple[torch.nn.Parameter, danlu.Lazy]:
        p = torch.nn.Parameter(values((20, 4), 0, wild=False))
        inner = danlu.AdamW([p], backend=backend, state_dtype=BF16)
        return p, danlu.Lazy(inner, mode)

    def train(p: torch.Tensor, opt: torch.optim.Optimizer, steps: range) -> None:
        for t in steps:
            p.grad = gradient((20, 4), t, t % 6, F32)
            opt.step()

    p, opt = made()
    train(p, opt, range(5))
    q, resumed = made()
    q.data.copy_(p)
    resumed.load_state_dict(pickle.loads(pickle.dumps(opt.state_dict())))
    copied = copy.deepcopy(opt)
    pickled = pickle.loads(pickle.dumps(opt))
    assert pickled.mode == copied.mode == mode
    train(p, opt, range(5, 11))
    train(q, resumed, range(5, 11))
    for other in (resumed, copied, pickled):
        (r,) = other.param_groups[0]["params"]
        if other is not resumed:
            train(r, other, range(5, 11))
        assert same_bits(r, p)
        assert all(same_bits(other.state[r][key], value) for key, value in opt.state[p].items())


@every_mode
def test_groups_added_and_schedulers(mode: str, backend: str) -> None:
    p, q = (torch.nn.Parameter(torch.ones(4, 3)) for _ in range(2))
    opt = danlu.Lazy(danlu.Lion([p], lr=1.0, backend=backend), mode)
    scheduler = torch.optim.lr_scheduler.StepLR(opt, 1, gamma=0.5)
    p.grad = coo([2], torch.ones(1, 3), (4, 3))
    opt.step()
    scheduler.step()
    opt.add_param_group({"params": [q], "lr": 0.25})
    q.grad = coo([0], torch.ones(1, 3), (4, 3))
    opt.step()
    assert p[:, 0].tolist() == [1.0, 1.0, -0.5, 1.0]
    assert q[:, 0].tolist() == [0.75, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@every_mode
def test_an_embedding_trains_as_with_dense_gradients(mode: str, dtype: torch.dtype) -> None:
    tables = []
    for sparse in (True, False):
        embedding = torch.nn.Embedding(30, 8, sparse=sparse, dtype=dtype)
        embedding.weight.data = values((30, 8), 0, wild=False).to(dtype)
        head = torch.nn.Linear(8, 4, dtype=dtype)
        for i, p in enumerate(head.parameters(), 1):
            p.data = values(p.shape, i, wild=False).to(dtype)
        groups = [
            {"params": embedding.parameters(), "lazy": True},
            {"params": head.parameters(), "lazy": False},
        ]
        opt = danlu.Lazy(danlu.AdamW(groups, lr=1e-2), mode)
        for t in range(6):
            opt.zero_grad()
            # each once: torch sums repeated rows of a dense gradient in another order
            tokens = torch.randperm(30, generator=torch.Generator().manual_seed(t))[:10]
            head(embedding(tokens)).square().sum().backward()
            assert embedding.weight.grad.is_sparse == sparse
            opt.step()
        tables.append([embedding.weight.detach(), *opt.state[embedding.weight].values(), *head.parameters()])
    assert all(map(same_bits, *tables))


@pytest.mark.parametrize("wrap", [danlu.EMA, danlu.Lookahead, lambda opt: danlu.GradientAccumulation(opt, 2)])
@every_mode
def test_wrappers_go_around(wrap: Callable[[Any], Any], mode: str) -> None:
    p, q = (torch.nn.Parameter(values((6, 3), 0, wild=False)) for _ in range(2))
    alone = danlu.Lazy(danlu.AdamW([q], weight_decay=0.5), mode)
    opt = wrap(danlu.Lazy(danlu.AdamW([p], weight_decay=0.5), mode))
    accumulates = isinstance(opt, danlu.GradientAccumulation)
    for t in range(4):
        p.grad = dense((6, 3), t // 2 if accumulates else t, wild=False)
        q.grad = p.grad.clone()
        opt.step()
        if not accumulates or t % 2:
            alone.step()
    assert same_bits(p, q)


def own_rule() -> type[danlu.FusedOptimizer]:
    def reference(
        p: torch.Tensor, g: torch.Tensor, m: torch.Tensor, *, step: float, lr: float, decay: float
    ) -> torch.Tensor:
        m.mul_(0.5).add_(g)
        return m * lr + p * decay

    return danlu.custom(
        "Own",
        states=["exp_avg"],
        defaults={"lr": 0.1, "decay": 0.25},
        reference=reference,
        coefficients=lambda math, *, step, lr, decay: dict(lr=lr, decay=decay),
    )


@every_mode
def test_a_rule_of_ones_own(mode: str) -> None:
    p = torch.nn.Parameter(torch.ones(3, 2))
    opt = danlu.Lazy(own_rule()([p], lr=0.5), mode)
    p.grad = torch.ones(3, 2)
    opt.step()
    assert p[0].tolist() == [0.25, 0.25]
    p.grad = coo([1], torch.ones(1, 2), (3, 2))
    opt.step()
    assert p[:, 0].tolist() == [0.25, 0.25 - 0.75 - 0.0625, 0.25]
    assert opt.state[p]["exp_avg"][:, 0].tolist() == ([1.0, 1.5, 1.0] if mode == "rows" else [0.5, 1.5, 0.5])


def test_layer_adaptation_sees_the_whole_parameter(backend: str) -> None:
    """The step that it adapts is that of all rows; those without a gradient keep their parameters."""
    p, q = (torch.nn.Parameter(values((6, 3), 0, wild=False)) for _ in range(2))
    lazy = danlu.Lazy(danlu.LayerAdaptation(danlu.AdamW([p], weight_decay=0.1, backend=backend)), "params")
    usual = danlu.LayerAdaptation(danlu.AdamW([q], weight_decay=0.1, backend=backend))
    for t in range(4):
        p.grad = dense((6, 3), t, wild=False)
        q.grad = p.grad.clone()
        kept = p.detach().clone()
        lazy.step()
        usual.step()
        takes_part = p.grad.ne(0).any(1)
        torch.testing.assert_close(
            p.detach(), torch.where(takes_part[:, None], q, kept).detach(), rtol=1e-5, atol=0
        )
        with torch.no_grad():
            q.copy_(p)
    (row,) = lazy.backend_report()
    assert row.backend == "reference"
    assert backend == "reference" or "no kernel sums over a lazy parameter" in row.reason


@every_mode
def test_a_dense_gradient_may_lie_otherwise_in_the_next_step(mode: str, backend: str) -> None:
    """With other strides, or as a lazily negated view."""
    p, q = (torch.nn.Parameter(values((12, 5), 0, wild=False)) for _ in range(2))
    lazy = [danlu.Lazy(danlu.AdamW([x], backend=b), mode) for x, b in ((p, backend), (q, "reference"))]
    strided, negated = permuted(1, 0), lambda g: torch._neg_view(-g)
    for t, form in enumerate((torch.clone, strided, torch.clone, negated, torch.clone)):
        g = dense((12, 5), t, wild=False)
        p.grad, q.grad = form(g), g
        for opt in lazy:
            opt.step()
    assert same_bits(p, q)
    assert all(same_bits(lazy[0].state[p][name], value) for name, value in lazy[1].state[q].items())


@every_mode
def test_the_default_dtype_is_no_matter(mode: str, backend: str) -> None:
    shape = (3000, 6)
    results = []
    try:
        for dtype in (F32, BF16):
            torch.set_default_dtype(dtype)
            p = torch.nn.Parameter(values(shape, 0, wild=False).float())
            opt = danlu.Lazy(danlu.AdamW([p], backend=backend), mode)
            for t in range(3):
                p.grad = coo([5 * t], values((1, 6), t, wild=False).float(), shape)
                opt.step()
            results.append([p.detach(), *opt.state[p].values()])
    finally:
        torch.set_default_dtype(F32)
    assert all(map(same_bits, *results))


@every_mode
def test_lr_zero_changes_no_parameter(mode: str, backend: str) -> None:
    p = torch.nn.Parameter(values((6, 3), 0, wild=False))
    before = p.detach().clone()
    opt = danlu.Lazy(danlu.AdamW([p], lr=0.0, backend=backend), mode)
    p.grad = coo([2], torch.ones(1, 3), (6, 3))
    opt.step()
    assert same_bits(p, before)
    assert opt.state[p]["exp_avg"][2].all()


def test_a_step_counts_as_a_write() -> None:
    (p,) = tensors()
    opt = danlu.Lazy(danlu.Lion([p]))
    p.grad = coo([2], torch.ones(1, 3), (4, 3))
    opt.step()
    version = p._version
    opt.step()
    assert p._version > version
