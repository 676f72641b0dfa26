"""How the benchmarks time a GPU and what they compare, over CPU tensors and a fake GPU."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import contenders
import cuda_harness
import cuda_memory
import danlu
import gpu_stages
import memcheck
import rounds
import step_time
from emulated import AVAILABLE, emulated
from fake_gpu import EVENTS, FakeGpu
from fake_stages import TINY, emulated_kernels, fake_gpu  # noqa: F401  fixtures
from harness import Model
from workloads import Workload, llama_8b_list

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="the emulator gives the bandwidth ceiling")


def test_time_on_gpu_lets_the_step_queue_up(fake: FakeGpu) -> None:
    seconds, host_bound = cuda_harness.time_on_gpu(fake.step, 0.01)
    one = ["synchronize", "sleep", "record", "step", "record", "query", "synchronize"]
    assert fake.calls == one * cuda_harness.SAMPLES
    assert fake.sleeps == [int(0.016 * cuda_harness.CYCLES_PER_SECOND)] * cuda_harness.SAMPLES
    assert 0 < seconds < 0.01
    assert not host_bound


def test_a_step_that_the_host_holds_up_is_told(fake: FakeGpu) -> None:
    fake.late = True
    assert cuda_harness.time_on_gpu(fake.step, 0.01)[1]
    first, second = fake.sleeps[:2]
    assert second > 2 * first
    fake.sleeps.clear()
    cuda_harness.time_on_gpu(fake.step, 100.0)
    assert max(fake.sleeps) == cuda_harness.LONGEST_SLEEP * cuda_harness.CYCLES_PER_SECOND


def test_host_time_starts_on_an_idle_gpu(fake: FakeGpu) -> None:
    assert cuda_harness.time_on_host(fake.step) > 0
    assert fake.calls == ["synchronize", "step"] * cuda_harness.SAMPLES + ["synchronize"]


def test_peak_of_a_step(fake: FakeGpu) -> None:
    assert cuda_memory.peak_allocated(fake.step) == 500
    assert fake.calls == ["synchronize", "reset_peak", "step", "synchronize"]


def test_kernels_are_told_from_copies_and_marks(fake: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    found = cuda_harness.kernels(fake.step)
    assert [kernel.name for kernel in found] == [e.name for e in EVENTS[:2]]
    assert cuda_harness.busy(found) == pytest.approx(150e-6)
    monkeypatch.setattr("fake_gpu.EVENTS", EVENTS[2:])
    with pytest.raises(RuntimeError, match="saw no kernel"):
        cuda_harness.kernels(fake.step)


def test_what_overlaps_counts_once() -> None:
    spans = [(3.0, 5.0), (0.0, 2.0), (1.0, 2.5), (1.5, 1.75)]
    assert cuda_harness.busy(cuda_harness.Ran("x", *span) for span in spans) == 4.5


def test_what_the_profiler_of_this_torch_gives_can_be_read() -> None:
    """The attributes that `kernels` reads."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        torch.ones(10).add_(1)
    (event,) = (e for e in profile.events() if e.name == "aten::add_")
    assert event.time_range.elapsed_us() > 0
    assert not event.is_user_annotation
    assert event.device_type != torch.autograd.DeviceType.CUDA


def test_the_bandwidth_ceiling_moves_as_many_bytes(fake: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr("danlu._cuda.bandwidth_ceiling", lambda *arguments: seen.append(arguments))
    cuda_harness.CudaBandwidthCeiling(1000).seconds(20 * 1000, 2)
    written, read, size, device, _stream = seen[0]
    assert (len(written), size, device) == (2, 1000, 0)
    assert read not in written


def test_a_ceiling_of_more_bytes_than_arrays_stays_inside(
    fake: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As LAMB's, which reads all of them twice; the time is that of all bytes."""
    seen = []
    monkeypatch.setattr("danlu._cuda.bandwidth_ceiling", lambda *arguments: seen.append(arguments))
    monkeypatch.setattr(cuda_harness, "time_on_gpu", lambda step, host: (7.0, False))
    assert cuda_harness.CudaBandwidthCeiling(1000).seconds(44 * 1000, 3) == pytest.approx(7 * 44 / 28)
    assert seen[0][2] == 1000


def test_held_gradients_are_seeded_and_not_zero(fake: FakeGpu) -> None:
    benches = [cuda_harness.OnCuda(TINY, {torch.bfloat16}) for _ in range(2)]
    models = [bench._models[torch.bfloat16] for bench in benches]
    for p, q in zip(*(model.parameters for model in models), strict=True):
        assert p.grad is not None
        assert q.grad is not None
        assert torch.equal(p, q)
        assert torch.equal(p.grad, q.grad)
        assert p.grad.count_nonzero() == p.numel()
    benches[0].zero_gradients()
    assert not any(p.grad.any() for p in models[0].parameters if p.grad is not None)


@pytest.mark.parametrize(
    "contender",
    [
        pytest.param(c, marks=pytest.mark.full if c.id.endswith("-triton") else ())
        for c in contenders.ON_CUDA
        if c not in gpu_stages.COMPILED
    ],
    ids=lambda c: c.id,
)
def test_bytes_that_a_step_has_to_touch(contender: contenders.Contender, fake: FakeGpu) -> None:
    bench = cuda_harness.OnCuda(TINY, {contender.dtype})
    optimizer = bench._warm(contender)
    p = optimizer.param_groups[0]["params"][0]
    written = [p, *(x for x in optimizer.state[p].values() if torch.is_tensor(x) and x.shape == p.shape)]
    assert contender.written == len(written)
    once = 2 * sum(x.element_size() for x in written) + p.grad.element_size()
    assert contender.bytes == once + contender.read_again


@pytest.mark.parametrize(
    "contender", [c for c in contenders.REDUCING_ON_CUDA if not c.backend], ids=lambda c: c.id
)
def test_bytes_of_rules_that_reduce(contender: contenders.Contender, kernels: FakeGpu) -> None:
    """As many as the kernels' passes read and write; sums of rows, columns and chunks are the slack."""
    workload = Workload("matrix", "one matrix", [(1024, 512)])
    model = Model(workload, contender.dtype)
    model.hold_gradients()
    optimizer = contender.make(model.parameters, backend="cuda")  # type: ignore[call-arg]
    optimizer.step()
    emulated().native.reset()
    emulated().native.machine().count_traffic()
    optimizer.step()
    machine = emulated().native.machine()
    moved = (machine.bytes_read + machine.bytes_written) / workload.elements
    assert contender.bytes <= moved <= contender.bytes + 0.4


def test_scratch_is_extra_memory(kernels: FakeGpu) -> None:
    for make, keeps in ((danlu.AdamW, False), (danlu.LAMB, True)):
        model = Model(TINY, torch.float32)
        model.hold_gradients()
        optimizer = make(model.parameters, backend="cuda")
        optimizer.step()
        assert (cuda_memory.scratch_bytes(optimizer) > 0) == keeps


@pytest.mark.filterwarnings("ignore")  # of torch's compiler
@pytest.mark.parametrize(
    ("make", "contender", "plain"),
    [
        (torch.optim.AdamW, contenders.TORCH_COMPILED, contenders.TORCH_ADAMW[0]),
        (torch.optim.Adafactor, contenders.TORCH_ADAFACTOR_COMPILED, contenders.TORCH_ADAFACTOR[0]),
    ],
    ids=["adamw", "adafactor"],
)
def test_a_compiled_step_is_torchs(
    make: Any, contender: contenders.Contender, plain: contenders.Contender, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs = []

    def keep(module: torch.fx.GraphModule, _: object) -> Any:
        graphs.append(module)
        return module.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=keep))
    params = [[torch.nn.Parameter(torch.linspace(-1, 1, 6).view(2, 3))] for _ in range(2)]
    for one, (p,) in zip((contender.make, make), params, strict=True):
        p.grad = torch.ones_like(p)
        optimizer = one([p])
        for _ in range(3):
            optimizer.step()
    torch.testing.assert_close(*params)
    assert len(graphs) == 1
    assert (contender.written, contender.bytes) == (plain.written, plain.bytes)


def test_step_time_on_cuda(
    fake: FakeGpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(step_time, "WORKLOADS", {"tiny": TINY})
    monkeypatch.setattr(torch, "compile", lambda step: step)  # the compiler takes its time
    step_time.main(["--device", "cuda", "--rounds", "2", "--workloads", "tiny", "--out", str(tmp_path)])
    results = json.loads((tmp_path / "step_time_cuda.json").read_text())
    assert results["environment"]["device"] == "Fake GPU"
    assert results["copy_GB_per_s"] > 0
    rows = {row["name"]: row for row in results["workloads"][0]["contenders"]}
    assert list(rows) == [c.id for c in contenders.ON_CUDA]
    compiled = rows.pop("torch-adamw-compile")  # not on CPU tensors
    assert "capturable" in compiled["failed"]
    for row in rows.values():
        assert 0 < row["ms"]["low"] <= row["ms"]["median"] <= row["ms"]["high"]
        assert row["launches"] == 2
        assert row["kernel_ms"]["median"] == pytest.approx(0.15)
        assert row["peak_extra_bytes"] >= 500
    out = capsys.readouterr().out
    assert "torch-adamw-compile: " in out
    assert "launches" in out
    assert (tmp_path / "step_time_cuda.png").stat().st_size > 0


def test_contenders_that_fail_or_are_left_out(fake: FakeGpu) -> None:
    def refuse(_: object) -> torch.optim.Optimizer:
        raise RuntimeError("no such thing\nand more")

    chosen = [
        contenders.Contender(contenders.BASELINE, refuse, 3, 28),
        contenders.Contender("limited", refuse, 3, 28, most_tensors=2, limit="left out"),
        contenders.ADAMW,
    ]
    measured = rounds.measure(cuda_harness.OnCuda, TINY, chosen, range(2), lambda *_: None)
    first, second, third = measured["contenders"]
    assert first["failed"] == "RuntimeError: no such thing"
    assert second["failed"] == "left out"
    assert third["ratio"] is None
    assert third["ms"]["median"] > 0


def test_a_fallback_is_not_measured(fake: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_harness, "BACKEND", "cuda")
    measured = rounds.measure(cuda_harness.OnCuda, TINY, [contenders.ADAMW], range(2), lambda *_: None)
    assert "takes backend cpu" in measured["contenders"][0]["failed"]


def test_one_compiled_optimizer_serves_all_turns(fake: FakeGpu) -> None:
    made = []

    def make(params: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        made.append(torch.optim.AdamW(params))
        return made[-1]

    for kept in (True, False):
        made.clear()
        contender = contenders.Contender("x", make, 3, 28, kept=kept)
        rounds.measure(cuda_harness.OnCuda, TINY, [contender], range(3), lambda *_: None)
        assert len(made) == (1 if kept else 4)


def test_what_memcheck_watches(capsys: pytest.CaptureFixture[str]) -> None:
    memcheck.main("cpu")
    assert capsys.readouterr().out.count("{'cpu'}") == 2 * len(memcheck.OPTIMIZERS)


def test_a_list_as_long_as_llama_8b() -> None:
    assert len(llama_8b_list().shapes) == 291
