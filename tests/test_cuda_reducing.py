"""CUDA kernels of rules that reduce, in the emulator: close to float64, deterministic, no wasted traffic."""

from __future__ import annotations

import dataclasses
import functools
import math

import pytest
import torch

import danlu
import listed_rules
from cases import (
    BF16,
    EVERY_REDUCING,
    F16,
    F32,
    F64,
    OTHER_LAYERED,
    REDUCING,
    STORAGES,
    Case,
    Storage,
    set_gradient,
    values,
)
from danlu.backends import cuda as cuda_backend
from danlu.backends.cuda import CudaExecutor
from danlu.schedule import Reduction
from danlu.testing import same_bits
from danlu.triton_kernels import rules as triton_rules
from emulated import STREAM, Emulated
from layouts import LAYOUTS, Layout, offset
from reductions import (
    CASE,
    DOUBLE,
    KINDS,
    LAST_BIT,
    MATRICES,
    TOLERANCE,
    assert_bits,
    difference,
    every_kind,
    far,
    singles,
)
from runs import Result, run
from training import all_same, check_found_inf, copies, everything, give_gradients, parameters

pytestmark = pytest.mark.usefixtures("poisoned_scratch", "cuda")

by_case = pytest.mark.parametrize("case", EVERY_REDUCING, ids=lambda c: c.id)
# one of each kind of geometry: narrow and wide tiles, parts, batches, rows at odd addresses
SOME = [
    layout
    for layout in MATRICES
    if layout.id in ("lanes-8", "few-rows-4", "tiles", "parts", "long-odd-rows", "many-small", "batch")
]
NAMES = {id(LAYOUTS): "layouts", id(MATRICES): "matrices", id(SOME): "some-matrices"}


def matrices(case: Case) -> list[Layout]:
    """But for 34,000 rows where each row is a block, which takes seconds to emulate."""
    return [layout for layout in MATRICES if layout.id != "tall" or case.id != "tiger-rows"]


@functools.cache
def stepped(case_id: str) -> Result:
    """What a step must give in any order, with any groups, and again."""
    case = CASE[case_id]
    return run(case, STORAGES[0], "cuda", wild=False, steps=2, layouts=matrices(case))


@pytest.mark.parametrize(
    ("case", "layouts"),
    [
        *((case, LAYOUTS) for case in REDUCING),
        *((case, MATRICES if case.id in KINDS else SOME) for case in EVERY_REDUCING),
        *(pytest.param(c, MATRICES, marks=pytest.mark.full) for c in EVERY_REDUCING if c.id not in KINDS),
    ],
    ids=lambda x: x.id if isinstance(x, Case) else NAMES[id(x)],
)
def test_close_to_float64(case: Case, layouts: list[Layout]) -> None:
    steps = 3 if layouts is MATRICES else 4
    got = run(case, STORAGES[0], "cuda", wild=False, steps=steps, layouts=layouts)
    want = run(case, DOUBLE, "reference", wild=False, steps=steps, layouts=layouts)
    assert not far(got, want, layouts)


@pytest.mark.parametrize("storage", [s for s in STORAGES[1:] if s.moment != F16], ids=lambda s: s.id)
@every_kind
def test_16_bits(case: Case, storage: Storage) -> None:
    """One step from the same numbers: what is stored differs by the last bit of 16 at most."""
    got, want = (
        run(case, storage, backend, wild=False, steps=1, layouts=SOME) for backend in ("cuda", "reference")
    )
    assert not far(got, want, SOME, LAST_BIT)
    assert not far(singles(got), singles(want), SOME)


@every_kind
def test_the_same_bits_from_run_to_run(case: Case) -> None:
    layouts = matrices(case)
    again = run(case, STORAGES[0], "cuda", wild=False, steps=2, layouts=layouts)
    assert_bits(again, stepped(case.id), layouts)


@every_kind
def test_blocks_and_threads_in_another_order(case: Case, cuda: Emulated) -> None:
    """Nothing reads what another block of its launch writes, or another thread between two barriers."""
    layouts, forwards = matrices(case), stepped(case.id)
    cuda.native.machine().backwards = True
    assert_bits(run(case, STORAGES[0], "cuda", wild=False, steps=2, layouts=layouts), forwards, layouts)


# Rows of whole packs and not, of one and of many in a turn, shorter and longer than one and than a chunk;
# chunks that begin and end amid them; more rows than a chunk can touch; matrices that end in a chunk.
WALKS = [
    *[(4100, 8), (3000, 12), (5000, 7), (20_000, 2), (33, 768), (9, 2056), (7, 4096)],
    *[(3, 4999), (3, 20_000), (3, 20_001), (2, 2, 16_387), (2, 2, 20_008)],
    *[(700, 3, 8), (9, 400, 12), (41, 5, 3, 3), (2, 17_000, 4), (3, 5, 2048)],
]


@pytest.mark.pairs
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["f32", "bf16"])
@pytest.mark.parametrize("shape", WALKS, ids=str)
@pytest.mark.parametrize(
    "case", [CASE["adafactor"], CASE["amos-rows"], CASE["amos-columns"]], ids=lambda c: c.id
)
def test_each_element_sees_its_own_row_and_column(
    case: Case, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    """What stands for them differs by far from what stands for their neighbours."""
    rows = 10.0 ** (torch.arange(math.prod(shape[:-1])) % 7 % 4).view(*shape[:-1], 1)
    scales = rows * (1 + torch.arange(shape[-1]) % 7)
    g = (values(shape, 1, wild=False) * scales).to(dtype)
    results = []
    for backend, kind in (("cuda", dtype), ("reference", F64)):
        p = torch.nn.Parameter(torch.zeros(shape, dtype=kind))
        set_gradient(p, g.to(kind))
        case.make([p], backend=backend).step()
        results.append(p.detach().double())
    got, want = results
    assert want.abs().mean() > 1e-7
    assert ((got - want).abs() <= (1e-4 if dtype == F32 else 4e-3) * want.abs() + 1e-10).all()


@pytest.mark.parametrize("shape", [(20, 64), (9, 13)], ids=str)
def test_rows_and_columns_of_zeros_under_a_floor(shape: tuple[int, ...]) -> None:
    """torch's preset bounds the inverse roots, which a rule without a floor would multiply zeros with."""
    g = values(shape, 1, wild=False)
    g[3], g[:, 5] = 0.0, 0.0
    p = torch.nn.Parameter(torch.ones(shape))
    set_gradient(p, g)
    CASE["adafactor-torch"].make([p], backend="cuda", weight_decay=0.0).step()
    assert (p[3] == 1).all()
    assert (p[:, 5] == 1).all()
    assert ((p - 1).abs() > 0).sum() == (shape[0] - 1) * (shape[1] - 1)


@every_kind
def test_coefficients_from_the_device(case: Case) -> None:
    """The same bits as with coefficients from the host."""
    layouts = matrices(case)
    device = run(case, STORAGES[0], "cuda", wild=False, steps=2, layouts=layouts, capturable=True)
    assert_bits(device, stepped(case.id), layouts)


@pytest.mark.parametrize("size", [1e4, pytest.param(1e5, marks=pytest.mark.full), 1e6])
@every_kind
def test_groups_change_no_bit(case: Case, size: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scratch that the groups share holds nothing that the next one needs."""
    layouts, together = matrices(case), stepped(case.id)
    monkeypatch.setattr(cuda_backend, "group_bytes", lambda device: size)
    assert_bits(run(case, STORAGES[0], "cuda", wild=False, steps=2, layouts=layouts), together, layouts)


@every_kind
def test_alignment_changes_no_bit_of_a_sum(case: Case) -> None:
    """Which thread adds up what does not depend on addresses."""
    shapes = [layout.shape for layout in matrices(case)]
    plain = [Layout(str(shape), shape) for shape in shapes]
    moved = [Layout(str(shape), shape, offset(1), offset(3)) for shape in shapes]
    a, b = (
        run(case, STORAGES[0], "cuda", wild=False, steps=2, layouts=layouts) for layouts in (plain, moved)
    )
    reduced = {"row_var", "col_var"} if case.optimizer is danlu.Adafactor else set()
    for layout, x, y in zip(plain, a, b, strict=True):
        assert all(same_bits(x[key], y[key]) for key in reduced & set(x)), layout.id
        assert all(difference(x[key], y[key]) < TOLERANCE for key in x), layout.id


@by_case
def test_parameters_without_a_gradient_stay(case: Case) -> None:
    shapes = [(40, 30), (300, 40), (1, 7), (70, 300)]
    a, b = (
        case.make(
            [torch.nn.Parameter(values(s, i, wild=False)) for i, s in enumerate(shapes)], backend=backend
        )
        for backend in ("cuda", "cpu")
    )
    for t in range(5):
        for opt in (a, b):
            give_gradients(parameters(opt), t)
            parameters(opt)[t % 4].grad = None
            opt.step()
    assert all(map(case.agrees, everything(a), everything(b)))


@by_case
def test_found_inf_touches_nothing(case: Case) -> None:
    check_found_inf(
        case.make([torch.nn.Parameter(values((70, 300), 1, wild=False))], backend="cuda", capturable=True)
    )


def test_lamb_takes_three_launches(cuda: Emulated) -> None:
    """For any number of tensors and groups."""
    params = [torch.nn.Parameter(torch.ones(1 + i % 3, 5)) for i in range(1500)]
    groups = [{"params": params[::2]}, {"params": params[1::2], "weight_decay": 0.0}]
    opt = danlu.LAMB(groups, backend="cuda")
    for p in params:
        p.grad = torch.ones_like(p)
    for _ in range(2):
        cuda.native.reset()
        cuda.native.machine().end_block = 1  # what they compute is not looked at
        opt.step()
    assert [(one.blocks, one.stream) for one in cuda.native.machine().launches] == [(1500, STREAM)] * 3


def test_launches_of_a_group(cuda: Emulated, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small matrices share their launches, as vectors do; a large one has its own."""
    monkeypatch.setattr(cuda_backend, "group_bytes", lambda device: 4e5)
    shapes = [*[(60, 60)] * 20, *[(60,)] * 20, (400, 500)]
    params = [torch.nn.Parameter(torch.ones(shape)) for shape in shapes]
    opt = danlu.Adafactor(params, lr=0.1, backend="cuda")
    for p in params:
        p.grad = torch.ones_like(p)
    opt.step()
    cuda.native.reset()
    opt.step()
    # reduce_gradient, update_factors (2), reduce_norms, finalize, apply, twice; the last three of the vectors
    assert len(cuda.native.machine().launches) == 6 + 6 + 3


def traffic(case: Case, storage: Storage, cuda: Emulated, **options: object) -> tuple[float, float]:
    """Bytes that one step reads and writes for each element; what a launch touches again is in the cache."""
    p = torch.nn.Parameter(values((512, 2048), 0, wild=False).to(storage.param))
    set_gradient(p, values(p.shape, 1, wild=False).to(storage.grad))
    opt = case.make([p], backend="cuda", state_dtype=storage.moment, **options)
    cuda.native.machine().count_traffic()
    opt.step()
    machine = cuda.native.machine()
    return machine.bytes_read / p.numel(), machine.bytes_written / p.numel()


ARRAYS = {  # passes over p, g and the first moment; second moments read; what is written: p, m, v
    "adafactor": ((2, 3, 0), 0, (1, 0, 0)),
    "adafactor-momentum": ((2, 3, 1), 0, (1, 1, 0)),
    "adafactor-torch": ((2, 3, 0), 0, (1, 0, 0)),
    "adafactor-optax": ((2, 3, 1), 0, (1, 1, 0)),
    "adafactor-big-vision": ((1, 2, 1), 0, (1, 1, 0)),
    "lamb": ((2, 2, 2), 2, (1, 1, 1)),
    "tiger-matrix": ((2, 1, 1), 0, (1, 1, 0)),
    "tiger-rows": ((1, 1, 1), 0, (1, 1, 0)),
    "amos": ((1, 2, 0), 0, (1, 0, 0)),
    "amos-momentum": ((1, 2, 1), 0, (1, 1, 0)),
    "amos-full": ((1, 1, 1), 2, (1, 1, 2)),
    "adafactor-root": ((2, 3, 0), 0, (1, 0, 0)),
    "adafactor-root-momentum": ((2, 3, 1), 0, (1, 1, 0)),
    "lamb-not-adapted": ((2, 2, 2), 2, (1, 1, 1)),
    "amos-rows": ((1, 2, 0), 0, (1, 0, 0)),
    "amos-rows-momentum": ((1, 2, 1), 0, (1, 1, 0)),
    "amos-columns": ((1, 2, 0), 0, (1, 0, 0)),
    "amos-columns-momentum": ((1, 2, 1), 0, (1, 1, 0)),
    "layer-lion": ((2, 2, 2), 0, (1, 1, 0)),
    "layer-tiger-accumulate": ((2, 2, 2), 0, (0, 1, 0)),  # the first of three gradients
    **{
        f"layer-{name}": ((2, 2, 2), 2, (1, 1, 1))
        for name in ("adam", "adamw", "adax", "adax-inside", "adaxw", "adaxw-inside")
    },
}


@pytest.mark.parametrize("storage", [STORAGES[0], STORAGES[1], STORAGES[3]], ids=lambda s: s.id)
@every_kind
def test_traffic(case: Case, storage: Storage, cuda: Emulated) -> None:
    """Each pass touches what it must and nothing else; sums of rows, columns and chunks are the slack."""
    reads, second, writes = ARRAYS[case.id]
    sizes = [d.itemsize for d in (storage.param, storage.grad, storage.moment)]
    want_read = sum(n * size for n, size in zip(reads, sizes, strict=True)) + 4 * second
    want_written = writes[0] * sizes[0] + writes[1] * sizes[2] + writes[2] * 4
    read, written = traffic(case, storage, cuda)
    assert want_read <= read <= want_read + 0.19
    assert want_written <= written <= want_written + 0.19


def test_without_scale_and_clipping_nothing_is_measured(cuda: Emulated) -> None:
    case = CASE["adafactor"]
    read, _ = traffic(case, STORAGES[0], cuda, scale_parameter=False)
    assert 16 <= read <= 16.19  # p in one pass only
    cuda.native.reset()
    read, _ = traffic(case, STORAGES[0], cuda, scale_parameter=False, clip_threshold=None)
    assert 12 <= read <= 12.19


def test_a_launch_that_fails_names_a_parameter(cuda: Emulated) -> None:
    params = [
        ("weight", torch.nn.Parameter(torch.ones(40, 50))),
        ("bias", torch.nn.Parameter(torch.ones(50))),
    ]
    opt = danlu.Adafactor(params, lr=0.1, backend="cuda")
    for _, p in params:
        p.grad = torch.ones_like(p)
    opt.step()
    before = copies(opt)
    cuda.native.machine().fail_launch = 0
    with pytest.raises(RuntimeError, match=r"^weight: the CUDA kernel could not be launched") as failure:
        opt.step()
    assert "earlier launches" not in str(failure.value)
    assert all_same(everything(opt), before)
    cuda.native.machine().fail_launch = 1
    with pytest.raises(RuntimeError, match=r"^weight: .*; earlier launches of this step have been made"):
        opt.step()
    cuda.native.machine().fail_launch = 7
    with pytest.raises(RuntimeError, match=r"^bias: .*; earlier launches of this step have been made"):
        opt.step()


def test_tables_travel_only_when_they_change() -> None:
    params = [torch.nn.Parameter(torch.ones(40, 50)) for _ in range(3)]
    opt = danlu.LAMB(params, backend="cuda")
    for _ in range(4):
        for p in params:
            p.grad = torch.ones_like(p) if p.grad is None else p.grad
        opt.step()
    assert opt._plan is not None
    (executor,) = opt._plan._executors
    assert isinstance(executor, CudaExecutor)
    ((_, tensors),) = executor._reducing
    assert (tensors.addresses.sent, executor._staged_coefficients.sent) == (1, 4)
    params[1].grad = None
    opt.step()
    assert tensors.addresses.sent == 2


def test_sums_beyond_the_precision_of_fp32() -> None:
    """fp32 sums of so many ones would stop at 2^24."""
    p = torch.nn.Parameter(torch.ones(3, 30_000_000 // 3))
    p.grad = torch.ones_like(p)
    opt = danlu.LAMB([p], lr=1e-3, weight_decay=0.0, backend="cuda")
    opt.step()
    # u is 1 up to eps, so that the ratio is 1
    assert p[0, 0].item() == pytest.approx(1 - 1e-3, abs=1e-7)


def test_every_rule_is_among_the_cases(cuda: Emulated) -> None:
    """And the list of rules of each backend says the same of it."""
    names = set()
    for case in EVERY_REDUCING + OTHER_LAYERED:
        opt = case.make([torch.nn.Parameter(torch.ones(1, 1))])
        by_dims = "rows" in case.id or "columns" in case.id
        for shape in ((1, 4), (40, 50), (200, 300), *([] if by_dims else [(4,)])):
            names.add(opt.rule(opt.param_groups[0], shape))
    assert names == {rule.name for rule in listed_rules.REDUCING}
    for name in names:
        rule = triton_rules.RULES[name]
        nothing = Reduction("none", sums=0)  # Triton's element-wise kernel takes such a rule
        assert dataclasses.astuple(rule.reduction or nothing) == cuda.native.reduction(name)
        assert rule.coefficients == tuple(cuda.native.coefficient_names(name))
    assert cuda.native.reduction("adamw") is None
    assert cuda.native.reduction("lamb") == ("none", 2, False)
    assert cuda.native.reduction("tiger_rows") == ("none", 1, True)
    assert cuda.native.reduction("adafactor_factored") == ("both", 2, False)
    assert cuda.native.reduction("amos_rows") == ("rows", 0, False)


def test_formats_without_a_kernel(cuda: Emulated) -> None:
    assert cuda.native.has_kernel("lamb", ["float32", "float32", "bfloat16", "float32"])
    assert not cuda.native.has_kernel("lamb", ["float32", "float32", "float32", "bfloat16"])
    assert cuda.native.has_kernel("adafactor_momentum", ["float32", "float32", "float32", "bfloat16"])
    assert not cuda.native.has_kernel("adafactor_momentum", ["float32", "float32", "bfloat16", "float32"])
    assert not cuda.native.has_kernel("adafactor", ["float32", "float16", "float32"])
