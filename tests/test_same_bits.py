"""Native kernels give the bits of the reference: for every rule, storage, layout, thread count, value."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import danlu
from cases import CASES, STORAGES, Case, Storage, set_gradient, stored, values
from danlu import _cpu
from danlu.testing import same_bits
from layouts import LAYOUTS
from runs import assert_flushing_changes_nothing, assert_same, expected, run

INSTRUCTION_SETS = _cpu.instruction_sets()


@pytest.mark.pairs
@pytest.mark.parametrize("threads", [1, 2, 3, 8])
@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
@pytest.mark.parametrize(("case", "storage"), stored(STORAGES))
def test_same_bits_as_the_reference(
    case: Case, storage: Storage, isa: str, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DANLU_CPU_ISA", isa)
    torch.set_num_threads(threads)
    assert_same(run(case, storage, "cpu"), expected(case.id, storage))


@pytest.mark.pairs
@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
@pytest.mark.parametrize(("case", "storage"), stored(STORAGES[:4]))
def test_same_bits_for_ordinary_numbers(
    case: Case, storage: Storage, isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wild values soon make most elements NaN or infinite; these keep every one of them at work."""
    monkeypatch.setenv("DANLU_CPU_ISA", isa)
    want = expected(case.id, storage, wild=False)
    assert all(state["param"].isfinite().all() for state in want)
    assert_same(run(case, storage, "cpu", wild=False), want)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_same_bits_without_the_exchange_api(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DANLU_DLPACK", "0")
    assert_same(run(case, STORAGES[1], "cpu"), expected(case.id, STORAGES[1]))


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_flush_denormal_changes_nothing(case: Case, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A setting of the calling thread; neither values nor coefficients may depend on who computes them."""
    monkeypatch.setenv("DANLU_CPU_ISA", isa)
    assert_flushing_changes_nothing(case, "cpu")


# flushes in the threads that the kernels will use, too: they take the mode of the one that starts them
STEPS_IN_FLUSHING_THREADS = """
import sys, torch
torch.set_num_threads(3)
assert torch.set_flush_denormal(True)
torch.ones(1 << 22).add_(1)
sys.path.insert(0, sys.argv[3])
from test_same_bits import three_steps
torch.save(three_steps(*torch.load(sys.argv[1])), sys.argv[2])
"""


def three_steps(start: torch.Tensor, gradient: torch.Tensor) -> list[torch.Tensor]:
    p = torch.nn.Parameter(start)
    opt = danlu.AdamW([p], lr=1e-3, eps=0.0, weight_decay=0.0, backend="cpu")
    p.grad = gradient
    for _ in range(3):
        opt.step()
    return [p.detach(), opt.state[p]["exp_avg"]]


def test_flushing_threads_change_nothing(tmp_path: Path) -> None:
    inputs, output = tmp_path / "inputs.pt", tmp_path / "output.pt"
    torch.save([values((500_000,), 0), values((500_000,), 1, wild=False) * 1e-38], inputs)
    tests = Path(__file__).parent
    command = [sys.executable, "-c", STEPS_IN_FLUSHING_THREADS, *map(str, (inputs, output, tests))]
    subprocess.run(command, check=True)
    torch.set_num_threads(3)
    results = [three_steps(*torch.load(inputs)), torch.load(output)]
    assert all(map(same_bits, *results))
    subnormal = (results[0][1] != 0) & (results[0][1].abs() < torch.finfo(torch.float32).tiny)
    assert subnormal.any()


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_dtypes_may_mix_in_a_group(case: Case) -> None:
    results = []
    for backend in ("cpu", "reference"):
        params = [torch.nn.Parameter(values((7 * i + 1,), i).to(s.param)) for i, s in enumerate(STORAGES)]
        opt = case.make(params, backend=backend)
        for t in range(4):
            for i, (p, storage) in enumerate(zip(params, STORAGES, strict=True)):
                set_gradient(p, values(p.shape, 100 * t + i).to(storage.grad))
            opt.step()
        results.append([{"param": p.detach(), **opt.state[p]} for p in params])
    for got, want in zip(*results, strict=True):
        assert all(same_bits(got[key], want[key]) for key in want)


def _child(queue: multiprocessing.Queue[list[bool]]) -> None:
    case, storage = CASES[4], STORAGES[0]
    torch.get_num_threads = lambda: 2  # for the step alone: torch's own operations must start none here
    got, want = run(case, storage, "cpu", steps=3), run(case, storage, "reference", steps=3)
    queue.put([same_bits(a[key], b[key]) for a, b in zip(got, want, strict=True) for key in b])


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_steps_on() -> None:
    """OpenMP hangs in a child whose parent has started threads; there the step is serial."""
    run(CASES[4], STORAGES[0], "cpu", steps=1)
    torch.set_num_threads(1)
    context = multiprocessing.get_context("fork")
    queue: multiprocessing.Queue[list[bool]] = context.Queue()
    child = context.Process(target=_child, args=(queue,))
    child.start()
    try:
        same = queue.get(timeout=60)
    finally:
        child.terminate()
        child.join()
    assert same
    assert all(same)


@pytest.mark.parametrize("storage", STORAGES, ids=lambda s: s.id)
def test_who_takes_what(storage: Storage) -> None:
    params = [
        torch.nn.Parameter(layout.param(values(layout.shape, 0).to(storage.param))) for layout in LAYOUTS
    ]
    opt = danlu.AdamW(params, state_dtype=storage.moment)
    for layout, p in zip(LAYOUTS, params, strict=True):
        set_gradient(p, layout.grad(values(layout.shape, 1).to(storage.grad)))
    for report in (opt.backend_report(), (opt.step(), opt.backend_report())[1]):
        taken = {layout.id: row.backend for layout, row in zip(LAYOUTS, report, strict=True)}
        assert taken == {layout.id: "cpu" if layout.native else "reference" for layout in LAYOUTS}
        slow = [row.reason for row in report if row.backend == "reference"]
        assert all("strides" in reason for reason in slow)
        assert "native kernels" in str(report)
