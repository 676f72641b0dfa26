"""Lazy steps: rows that take no part stay as they are, the others move as without `danlu.Lazy`."""

from __future__ import annotations

import pytest
import torch

import danlu
from cases import BF16, F16, F32, F64, STORAGES, Case, Storage, values
from danlu import _cpu
from danlu.listed_rows import rows_taking_part, summed_rows
from danlu.testing import same_bits
from layouts import permuted
from lazy_runs import LAZY, MODES, assert_same, coo, dense, gradient, listed, run
from oracles.lazy_rows import PlainLazy

every_case = pytest.mark.parametrize("case", LAZY, ids=lambda c: c.id)
# every list of states and kind of decay; formulas meet every storage where all rows take part
OFTEN = [
    case
    if case.id in ("lion", "tiger", "adam", "adamw", "adaxw-inside")
    else pytest.param(case, marks=pytest.mark.full)
    for case in LAZY
]
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
@pytest.mark.parametrize("case", OFTEN, ids=lambda c: c.id)
def test_same_bits_as_the_reference(case: Case, storage: Storage, mode: str) -> None:
    torch.set_num_threads(3)
    assert_same(run(case, storage, "cpu", mode), expected(case, storage, mode))


@pytest.mark.pairs
@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("capturable", [False, True], ids=["host", "device"])
@pytest.mark.parametrize("storage", [s for s in STORAGES if s.moment != F16], ids=lambda s: s.id)
@every_mode
@pytest.mark.parametrize("case", OFTEN, ids=lambda c: c.id)
def test_same_bits_of_cuda_kernels(case: Case, mode: str, storage: Storage, capturable: bool) -> None:
    """With coefficients from the host, and with those computed by torch beside the counters."""
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


@pytest.mark.pairs
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
