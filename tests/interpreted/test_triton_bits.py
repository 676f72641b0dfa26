"""The Triton kernels give the bits of the CPU kernels, under Triton's interpreter.

The interpreter takes milliseconds for an operation, whatever its size: few steps, few programs.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch

import danlu
from cases import BF16, CASES, F32, STORAGES, Case, Storage, set_gradient, values
from danlu.backends.triton import TritonExecutor, _Launch
from danlu.testing import same_bits
from layouts import LAYOUTS, Layout, reserved
from runs import Result, assert_same, run
from training import all_same, check_found_inf, everything, give_gradients, parameters, some_params

BLOCK, CHUNK = 4096, 16384
# several programs and a whole one, which for CPUs are larger
SHORTER = {"several-chunks": (2 * CHUNK + 5,), "one-chunk": (CHUNK,)}
NATIVE = [replace(layout, shape=SHORTER.get(layout.id, layout.shape)) for layout in LAYOUTS if layout.native]
FEW = [layout for layout in NATIVE if layout.id in ("scalar", "tail", "matrix", "both-offset")]
STEPS = 2
every_case = pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
# every rule in two formats, every format with two rules: what converts knows no rule. What is left to --all
# is executed as it is compiled, too (test_machine_code_ptx.py); that has the last of these formats not
WITHOUT_ALL = [("lion", STORAGES[0]), ("tiger-accumulate", STORAGES[0])]
WITHOUT_ALL += [("adamw", storage) for storage in (STORAGES[0], STORAGES[3], STORAGES[-1])]
FORMATS = [
    pytest.param(
        case,
        storage,
        id=f"{case.id}-{storage.id}",
        marks=() if (case.id, storage) in WITHOUT_ALL else pytest.mark.full,
    )
    for i, case in enumerate(CASES)
    for storage in STORAGES
    if case.id in ("lion", "adamw") or storage in (STORAGES[0], STORAGES[1 + i % (len(STORAGES) - 1)])
]


@functools.cache
def expected(case_id: str, storage: Storage) -> Result:
    case = next(c for c in CASES if c.id == case_id)
    return run(case, storage, "cpu", steps=STEPS, layouts=NATIVE)


@pytest.mark.parametrize(("case", "storage"), FORMATS)
def test_same_bits(case: Case, storage: Storage) -> None:
    """Over layouts, alignments, tails, empty tensors, two groups; with subnormals, infinities and NaN."""
    got = run(case, storage, "triton", steps=STEPS, layouts=NATIVE)
    assert_same(got, expected(case.id, storage), NATIVE)


@pytest.mark.parametrize(
    "layouts", [pytest.param(FEW, id="few"), pytest.param(NATIVE, id="all", marks=pytest.mark.full)]
)
@every_case
def test_same_bits_for_ordinary_numbers_and_coefficients_from_the_device(
    case: Case, layouts: list[Layout]
) -> None:
    for storage in (STORAGES[0], STORAGES[1]):
        how = dict(wild=False, steps=STEPS, layouts=layouts)
        got = run(case, storage, "triton", capturable=True, **how)
        assert_same(got, run(case, storage, "cpu", **how), layouts)


def placed(x: torch.Tensor, shift: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A copy `shift` elements after an aligned address, and the room around it."""
    room = torch.full((x.numel() + 96,), 7.0, dtype=x.dtype)
    first = -room.data_ptr() // x.element_size() % (64 // x.element_size()) + shift
    view = room[first : first + x.numel()]
    view.copy_(x)
    return view, room


@pytest.mark.parametrize("storage", [STORAGES[0], STORAGES[3]], ids=lambda s: s.id)
@pytest.mark.parametrize("case", [CASES[0], CASES[4]], ids=lambda c: c.id)
def test_every_alignment_and_tail(case: Case, storage: Storage) -> None:
    """What lies around the tensors stays as it was."""
    sizes = [1, 7, BLOCK - 1, BLOCK, BLOCK + 1, CHUNK - 1, CHUNK, CHUNK + 5]
    results = []
    for backend in ("triton", "cpu"):
        params, rooms = [], []
        for i, size in enumerate(sizes):
            for shift in (0, 1, 8):
                p, room = placed(values((size,), i, wild=False).to(storage.param), shift)
                params.append(torch.nn.Parameter(p))
                rooms.append(room)
                g, _ = placed(values((size,), 50 + i, wild=False).to(storage.grad), (shift + i) % 3)
                set_gradient(params[-1], g)
        opt = case.make(params, backend=backend, state_dtype=storage.moment)
        opt.step()
        results.append(rooms)
    assert all(map(same_bits, *results))


def test_nan_of_any_payload_stays_nan() -> None:
    """Rounded as other numbers are, some of them would become -0 or infinite."""
    patterns = [0x7F800001, 0x7FBFFFFF, 0x7FC00000, 0x7FFFFFFF, 0x7FFF8000, -1, -0x7FFFFF]
    g = torch.tensor(patterns, dtype=torch.int32).view(F32)
    assert bool(g.isnan().all())
    p = torch.nn.Parameter(torch.zeros(len(patterns)))
    p.grad = g
    opt = danlu.Lion([p], backend="triton", state_dtype=BF16)
    opt.step()
    assert bool(opt.state[p]["exp_avg"].isnan().all())


@pytest.mark.parametrize("size", [2**31 + 3, 2**32 + CHUNK + 5], ids=["2^31", "2^32"])
def test_offsets_beyond_32_bits(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the programs around the places that a 32-bit offset would miss are run, in untouched memory."""
    places = [0, 2**31 - 1, 2**31 + 1, size - 1] + ([2**32 + 1] if size > 2**32 else [])
    run_all = _Launch.run

    def run_some(launch: _Launch, *arguments: object) -> None:
        chunks = sorted({place // CHUNK for place in places})
        indices = torch.tensor(chunks, dtype=torch.int32)
        launch.chunks = (launch.chunks[0], torch.zeros_like(indices), indices)
        launch.programs = len(chunks)
        run_all(launch, *arguments)

    monkeypatch.setattr(_Launch, "run", run_some)
    p = torch.nn.Parameter(reserved(size), requires_grad=False)
    p.grad, moment = reserved(size), reserved(size)
    for place in places:
        p.grad[place] = 1.0
    opt = danlu.Lion([p], lr=0.5, backend="triton", state_dtype=BF16)
    opt.state[p] = {"step": torch.zeros(()), "exp_avg": moment}
    opt.step()
    assert [p[place].item() for place in places] == [-0.5] * len(places)
    assert p[5].item() == 0.0


def executor_of(opt: danlu.FusedOptimizer) -> TritonExecutor:
    assert opt._plan is not None
    (executor,) = opt._plan._executors
    assert isinstance(executor, TritonExecutor)
    return executor


def test_one_launch_for_each_combination_of_dtypes() -> None:
    params = some_params() + [torch.nn.Parameter(values((5,), 9).to(BF16)) for _ in range(2)]
    groups = [{"params": params[:2]}, {"params": params[2:], "lr": 0.1}]
    opt = danlu.AdamW(groups, backend="triton")
    for t in range(3):
        for i, p in enumerate(params):
            p.grad = values(p.shape, 10 * t + i, wild=False).to(p.dtype)
        opt.step()
    assert [launch.programs for launch in executor_of(opt).launches] == [3, 2]


def test_tables_travel_only_when_they_change() -> None:
    opt = danlu.Lion(some_params(), backend="triton")
    give_gradients(parameters(opt), 0)
    for _ in range(4):
        opt.step()
    executor = executor_of(opt)
    (launch,) = executor.launches
    assert (launch.table.sent, executor._staged_coefficients.sent) == (1, 1)
    opt.param_groups[0]["lr"] = 0.5
    opt.step()
    assert (launch.table.sent, executor._staged_coefficients.sent) == (1, 2)
    parameters(opt)[1].grad = values(parameters(opt)[1].shape, 3)
    opt.step()
    assert (launch.table.sent, executor._staged_coefficients.sent) == (2, 2)
    parameters(opt)[0].grad = None
    opt.step()
    assert (launch.table.sent, executor._staged_coefficients.sent) == (3, 2)


@every_case
def test_parameters_without_a_gradient_stay(case: Case) -> None:
    opt, plain = case.make(some_params(), backend="triton"), case.make(some_params(), backend="cpu")
    for t in range(4):
        for o in (opt, plain):
            params = parameters(o)
            give_gradients(params, t)
            params[t % 3].grad = None
            o.step()
        assert all_same(everything(opt), everything(plain))


@every_case
def test_found_inf_touches_nothing(case: Case) -> None:
    check_found_inf(case.make(some_params(), backend="triton", capturable=True))


def test_an_aligned_tensor_takes_the_loop_without_a_mask() -> None:
    """NaN behind the end of an array must reach no element, and a row belongs to its tensor."""
    p = torch.nn.Parameter(torch.full((3 * BLOCK + 1,), 2.0, dtype=F32))
    q = torch.nn.Parameter(torch.full((5,), 2.0, dtype=F32))
    p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
    opt = danlu.Lion([{"params": [p], "lr": 1.0}, {"params": [q], "lr": 0.5}], backend="triton")
    opt.step()
    assert bool((p == 1.0).all())
    assert bool((q == 1.5).all())
