"""The CUDA kernels give the bits of the reference: run thread by thread in the emulator, over CPU tensors."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import danlu
from cases import ALL, CASES, F16, STORAGES, Case, Storage, set_gradient, stored, values
from danlu.testing import same_bits
from emulated import Emulated
from layouts import LAYOUTS
from lazy_runs import MODES
from runs import assert_flushing_changes_nothing, assert_same, expected, run

pytestmark = pytest.mark.usefixtures("cuda")

COMPILED = [s for s in STORAGES if s.moment != F16]
CHUNK = 16384
every_case = pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
every_storage = pytest.mark.parametrize("storage", COMPILED, ids=lambda s: s.id)


@pytest.mark.pairs
@pytest.mark.parametrize("capturable", [False, True], ids=["host", "device"])
@pytest.mark.parametrize(("case", "storage"), stored(COMPILED))
def test_same_bits_as_the_reference(case: Case, storage: Storage, capturable: bool) -> None:
    """With coefficients from the host, and with those computed by torch beside the counters."""
    assert_same(run(case, storage, "cuda", capturable=capturable), expected(case.id, storage))


@pytest.mark.parametrize(("case", "storage"), stored(STORAGES[:4]))
def test_same_bits_for_ordinary_numbers(case: Case, storage: Storage) -> None:
    assert_same(run(case, storage, "cuda", wild=False), expected(case.id, storage, wild=False))


@every_case
def test_flush_denormal_changes_nothing(case: Case) -> None:
    """A GPU flushes nothing; coefficients are rounded on the host."""
    assert_flushing_changes_nothing(case, "cuda", 20_000)


def aligned_to(elements: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A copy that starts that many elements behind a multiple of 64 bytes, and the room it lies in, whose end
    is its own.
    """
    room = torch.full((x.numel() + elements + 64,), 7.0, dtype=x.dtype)
    first = -room.data_ptr() // x.element_size() % (64 // x.element_size()) + elements
    room = room[: first + x.numel()]
    view = room[first:]
    view.copy_(x)
    return view, room


@every_storage
@pytest.mark.parametrize("case", [CASES[0], CASES[4]], ids=lambda c: c.id)
def test_every_alignment_and_tail(case: Case, storage: Storage) -> None:
    """Parameter, gradient and states misaligned together or one of them alone, around every length that the
    kernel treats apart; what lies before the tensors stays as it was.
    """
    sizes = [1, 3, 4, 7, 8, 9, 255, 256, 1025, 2047, 2048, 2049, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 5]
    shifts = [
        (0, 0, 0, 0),
        (1, 1, 1, 1),
        (4, 4, 4, 4),
        (8, 8, 8, 8),
        (1, 0, 0, 0),
        (0, 2, 0, 0),
        (0, 0, 3, 0),
    ]
    shifts.append((0, 0, 0, 1))
    results = []
    for backend in ("cuda", "cpu"):
        params, rooms = [], []
        for i, size in enumerate(sizes):
            for shift in shifts:
                p, room = aligned_to(shift[0], values((size,), i, wild=False).to(storage.param))
                params.append(torch.nn.Parameter(p))
                rooms.append(room)
                g, _ = aligned_to(shift[1], values((size,), 50 + i, wild=False).to(storage.grad))
                set_gradient(params[-1], g)
        opt = case.make(params, backend=backend, state_dtype=storage.moment)
        for i, p in enumerate(params):
            shift = shifts[i % len(shifts)]
            opt.state[p]["step"] = torch.zeros(())
            for j, name in enumerate(opt.state_names):
                dtype = opt.state_dtype(name, p)
                state, room = aligned_to(shift[2 + j], values(p.shape, i, wild=False).abs().to(dtype))
                opt.state[p][name] = state
                rooms.append(room)
        opt.step()
        results.append(rooms)
    assert all(map(same_bits, *results))


@every_case
def test_dtypes_may_mix_in_a_group(case: Case, cuda: Emulated) -> None:
    results = []
    for backend in ("cuda", "reference"):
        params = [torch.nn.Parameter(values((7 * i + 1,), i).to(s.param)) for i, s in enumerate(COMPILED * 3)]
        opt = case.make(params, backend=backend)
        for t in range(3):
            for i, (p, storage) in enumerate(zip(params, COMPILED * 3, strict=True)):
                set_gradient(p, values(p.shape, 100 * t + i).to(storage.grad))
            opt.step()
        results.append([{"param": p.detach(), **opt.state[p]} for p in params])
    for got, want in zip(*results, strict=True):
        assert all(same_bits(got[key], want[key]) for key in want)
    kinds = {(s.param, s.grad) for s in COMPILED}
    assert len(cuda.native.machine().launches) == 3 * len(kinds)


@every_storage
def test_who_takes_what(storage: Storage) -> None:
    params = [
        torch.nn.Parameter(layout.param(values(layout.shape, 0).to(storage.param))) for layout in LAYOUTS
    ]
    opt = CASES[0].make(params, state_dtype=storage.moment, backend="cuda")
    for layout, p in zip(LAYOUTS, params, strict=True):
        set_gradient(p, layout.grad(values(layout.shape, 1).to(storage.grad)))
    taken = {layout.id: row.backend for layout, row in zip(LAYOUTS, opt.backend_report(), strict=True)}
    assert taken == {layout.id: "cuda" if layout.native else "reference" for layout in LAYOUTS}


def test_other_dtypes_are_refused_with_the_reason() -> None:
    p = torch.nn.Parameter(values((3,), 0).to(F16))
    p.grad = values((3,), 1).to(F16)
    opt = CASES[0].make([p], state_dtype=F16, backend="cuda")
    (row,) = opt.backend_report()
    assert row.backend == "reference"
    assert row.reason.endswith(
        "not cuda: no CUDA kernel for float16/float16/float16 (parameter/gradient/states)"
    )


def test_a_combination_that_was_left_out_is_told(cuda: Emulated, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not of a rule that has all that there are."""
    for complete, told in (("adamw,lamb", True), ("adamw,lion", False), ("all", False)):
        monkeypatch.setattr(cuda.native, "combinations", complete)
        p = torch.nn.Parameter(values((3,), 0).to(F16))
        opt = danlu.Lion([p], lr=1e-3, state_dtype=F16, backend="cuda")
        (row,) = opt.backend_report()
        reason = "; danlu._cuda is built with DANLU_CUDA_COMBINATIONS=" + complete
        assert row.reason.endswith(reason) == told


@pytest.mark.full
def test_nothing_is_touched_outside_a_tensor(tmp_path: Path) -> None:
    """Every rule once more under the sanitizers for addresses and undefined behaviour."""
    libraries = [
        subprocess.check_output(["gcc", f"-print-file-name={name}"], text=True).strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "OMP_NUM_THREADS": "1",
    }
    script = Path(__file__).parent / "sanitized.py"
    command = [sys.executable, str(script)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split()[-1] == str(2 * (len(ALL) + len(MODES)))
