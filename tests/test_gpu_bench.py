"""The benchmarks for a GPU, run over CPU tensors with fakes for what only a GPU has."""

from __future__ import annotations

import functools
import gc
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import baselines
import contenders
import cuda_harness
import gpu
import gpu_report
import gpu_stages
import memcheck
import rounds
import step_time
from emulated import AVAILABLE
from fake_gpu import EVENTS, FakeGpu
from harness import ROOT
from workloads import Workload, llama_8b_list

TINY = Workload("tiny", "a few tensors", [(40, 30), (30,), (7,)])
TINIER = Workload("tinier", "two tensors", [(64,), (3,)])
SHAPE = dict(rule="lion", formats="f32/f32/f32", threads=256, elements=8, min_blocks=4, chunk=16384)

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="the emulator gives the stream")


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpu]:
    made = FakeGpu()
    made.install(monkeypatch)
    yield made
    gc.unfreeze()


@pytest.fixture
def small(fake: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    """Small workloads for all stages, and no commands."""
    monkeypatch.setattr(gpu_stages, "MODELS", [TINY, TINIER])
    monkeypatch.setattr(gpu_stages, "GPT2", TINY)
    monkeypatch.setattr(gpu_stages, "MANY_SMALL", TINIER)
    monkeypatch.setattr(gpu_stages, "LLAMA_8B", TINIER)
    monkeypatch.setattr(gpu_stages, "STREAM_ELEMENTS", 1000)
    monkeypatch.setattr(gpu_stages, "limited", commands)
    return fake


def commands(command: list[Any], seconds: float, capture: bool = True, **env: str) -> tuple[int, str]:
    """What the commands of the stages may answer."""
    name = Path(command[0]).name
    if name == "tune":
        rows = [{**SHAPE, "workload": "one-tensor", "ms": 2.0, "gbps": 2700.0, "same_bits": True}]
        rows.append({**rows[0], "chunk": 4096, "ms": 1.9, "gbps": 2800.0})
        return 0, "".join(json.dumps(row) + "\n" for row in rows)
    if "gpu_tests.py" in str(command[1:2]):
        failed = {"test": "tests/gpu/test_x.py::test_a", "outcome": "failed", "message": "assert 1 == 2"}
        passed = {"test": "tests/gpu/test_x.py::test_b", "outcome": "passed", "message": ""}
        lines = [json.dumps(outcome) + "\n" for outcome in (failed, passed)]
        Path(command[2]).write_text("".join(lines) + '{"test": "tests/gpu/te')  # the process was ended
        return 1, ""
    return 0, ""


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
    assert cuda_harness.peak_allocated(fake.step) == 500
    assert fake.calls == ["synchronize", "reset_peak", "step", "synchronize"]


def test_kernels_are_told_from_copies_and_marks(fake: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    found = cuda_harness.kernels(fake.step)
    assert [name for name, _ in found] == [e.name for e in EVENTS[:2]]
    assert sum(seconds for _, seconds in found) == pytest.approx(150e-6)
    monkeypatch.setattr("fake_gpu.EVENTS", EVENTS[2:])
    with pytest.raises(RuntimeError, match="saw no kernel"):
        cuda_harness.kernels(fake.step)


def test_what_the_profiler_of_this_torch_gives_can_be_read() -> None:
    """The attributes that `kernels` reads."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        torch.ones(10).add_(1)
    (event,) = (e for e in profile.events() if e.name == "aten::add_")
    assert event.time_range.elapsed_us() > 0
    assert not event.is_user_annotation
    assert event.device_type != torch.autograd.DeviceType.CUDA


def test_stream_moves_as_many_bytes(fake: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr("danlu._cuda.stream", lambda *arguments: seen.append(arguments))
    cuda_harness.CudaStream(1000).seconds(20 * 1000, 2)
    written, read, size, device, _stream = seen[0]
    assert (len(written), size, device) == (2, 1000, 0)
    assert read not in written


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
    "contender", [c for c in contenders.ON_CUDA if c is not contenders.TORCH_COMPILED], ids=lambda c: c.id
)
def test_bytes_that_a_step_has_to_touch(contender: contenders.Contender, fake: FakeGpu) -> None:
    bench = cuda_harness.OnCuda(TINY, {contender.dtype})
    optimizer = bench._warm(contender)
    p = optimizer.param_groups[0]["params"][0]
    written = [p, *(x for x in optimizer.state[p].values() if torch.is_tensor(x) and x.shape == p.shape)]
    assert contender.written == len(written)
    assert contender.bytes == 2 * sum(x.element_size() for x in written) + p.grad.element_size()


@pytest.mark.filterwarnings("ignore")  # of torch's compiler
def test_a_compiled_step_is_adamw(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    params = [[torch.nn.Parameter(torch.linspace(-1, 1, 5))] for _ in range(2)]
    for make, (p,) in zip((baselines.compiled_adamw, torch.optim.AdamW), params, strict=True):
        p.grad = torch.ones_like(p)
        optimizer = make([p])
        for _ in range(3):
            optimizer.step()
    torch.testing.assert_close(*params)
    compiled, (adamw, *_) = contenders.TORCH_COMPILED, contenders.TORCH_ADAMW
    assert (compiled.written, compiled.bytes) == (adamw.written, adamw.bytes)


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
        assert row["peak_extra_bytes"] == 500
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


def test_all_stages(small: FakeGpu, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = gpu.main(["--out", str(tmp_path)])
    stages = json.loads((tmp_path / "gpu.json").read_text())["stages"]
    assert list(stages) == list(gpu_stages.STAGES)
    assert [name for name, entry in stages.items() if "result" not in entry] == []
    assert status == 1  # a test failed
    assert stages["tests"]["result"]["counts"] == {"failed": 1, "passed": 1}
    assert [measured["id"] for measured in stages["models"]["result"]] == ["tiny", "tinier"]
    for measured in (*stages["models"]["result"], stages["small_tensors"]["result"]):
        assert all(row["launches"] == 2 for row in measured["contenders"])
    assert {row["name"] for row in stages["zero_gradients"]["result"]} == {"adamw", "adax", "lion"}
    assert stages["cuda_graph"]["result"][0]["replay_ms"]["median"] > 0
    assert (tmp_path / "gpu.png").stat().st_size > 0
    out = capsys.readouterr().out
    assert "test_x.py::test_a: assert 1 == 2" in out
    assert "best 256/8/4/4096 1.900 ms" in out
    assert "cannot be shown" not in out
    assert len(gpu_report.lines(stages)) <= gpu_report.MOST_LINES


def test_a_stage_that_fails_does_not_stop_the_next(
    small: FakeGpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(_: object) -> None:
        raise ValueError("of no use\n")

    chosen = {"a": fails, "environment": gpu_stages.environment}
    monkeypatch.setattr(gpu, "STAGES", chosen)
    assert gpu.main(["--out", str(tmp_path)]) == 1
    stages = json.loads((tmp_path / "gpu.json").read_text())["stages"]
    assert "in fails" in stages["a"]["error"]
    assert "result" in stages["environment"]
    assert "FAILED a: ValueError: of no use" in capsys.readouterr().out


def test_a_new_process_goes_on_where_cuda_is_unusable(
    small: FakeGpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(_: object) -> str:
        small.broken = True
        return "done"

    def execv(path: str, arguments: list[str]) -> None:
        assert path == sys.executable
        assert arguments[1] == str(ROOT / "bench" / "gpu.py")
        raise SystemExit(gpu.main(arguments[2:]))

    def second(_: object) -> dict[str, Any]:
        assert small.broken
        small.broken = False
        return {"counts": {}, "exit_status": 0, "failures": []}

    monkeypatch.setattr(os, "execv", execv)
    monkeypatch.setattr(gpu, "STAGES", {"breaks": breaks, "tests": second})
    with pytest.raises(SystemExit, match=r"^0$"):
        gpu.main(["--out", str(tmp_path)])
    stages = json.loads((tmp_path / "gpu.json").read_text())["stages"]
    assert stages["breaks"]["result"] == "done"
    assert "result" in stages["tests"]


def test_the_time_is_up(small: FakeGpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def long(_: object) -> None:
        try:
            time.sleep(30)
        except Exception:
            pytest.fail("a guard of a contender would have swallowed it")

    monkeypatch.setattr(gpu, "BUDGET", 0.3)
    monkeypatch.setattr(gpu, "GRACE", 0.2)
    monkeypatch.setattr(gpu, "STAGES", {"long": long, "next": long})
    start = time.time()
    gpu.main(["--out", str(tmp_path)])
    assert time.time() - start < 10
    stages = json.loads((tmp_path / "gpu.json").read_text())["stages"]
    assert "OutOfTimeError" in stages["long"]["error"]
    assert "had passed" in stages["next"]["skipped"]


def test_outcomes_of_tests_in_a_process_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pytest.ini").write_text("[pytest]\nfilterwarnings = error\n")
    (tmp_path / "test_it.py").write_text(
        "import os, pytest, warnings\n"
        "def test_passes(): warnings.warn('old')\n"
        "def test_fails(): assert 1 == 2\n"
        "def test_skips(): pytest.skip('not today')\n"
        "@pytest.fixture\n"
        "def bad(): raise OSError('no fixture')\n"
        "def test_error(bad): pass\n"
        "def test_crashes(): os.abort()\n"
    )
    monkeypatch.setattr(gpu_stages, "TESTS", tmp_path)
    result = gpu_stages.tests({})
    assert result["counts"] == {"passed": 1, "failed": 2, "skipped": 1}
    assert [f["test"].split("::")[1] for f in result["failures"]] == ["test_fails", "test_error"]
    assert "assert 1 == 2" in result["failures"][0]["message"]
    assert result["skipped"] == {"Skipped: not today": 1}
    assert result["exit_status"] == -6


def test_commands_end_with_all_their_children() -> None:
    start = time.time()
    status, output = gpu_stages.limited(["bash", "-c", "echo $X; (sleep 60; echo no)"], 1.0, X="yes")
    assert (status, output) == (None, "yes\n")
    assert time.time() - start < 20
    assert gpu_stages.limited(["bash", "-c", "exit 9"], 10.0) == (9, "")


def test_a_command_that_fails_is_an_error(small: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_stages, "limited", lambda *_: (1, "no such architecture"))
    with pytest.raises(RuntimeError, match="nvcc: exit status 1: no such architecture"):
        gpu_stages.shapes({})


@pytest.mark.parametrize("status", [0, 9, None, 1])
def test_memcheck_tells_its_outcome(
    status: int | None, small: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: "/bin/tool")
    monkeypatch.setattr(gpu_stages, "limited", lambda *_, **env: (status, str(env)))
    result = gpu_stages.memcheck({})
    said = {0: "no errors", 9: "ERRORS", None: "not done after 60 s", 1: "exit status 1"}
    assert result == {"outcome": said[status], "output": "{'PYTORCH_NO_CUDA_MEMORY_CACHING': '1'}"}
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert "not installed" in gpu_stages.memcheck({})["outcome"]


def test_what_memcheck_watches(capsys: pytest.CaptureFixture[str]) -> None:
    memcheck.main("cpu")
    assert capsys.readouterr().out.count("{'cpu'}") == 4


def test_a_list_as_long_as_llama_8b() -> None:
    assert len(llama_8b_list().shapes) == 291


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        step_time.main(["--device", "cuda", "--out", str(tmp_path)])
    assert stopped.value.code == 2
    assert gpu.main(["--out", str(tmp_path)]) == 1
    assert capsys.readouterr().err.count("torch sees no CUDA device") == 2
    script = ROOT / "bench" / "gpu.sh"
    subprocess.run(["bash", "-n", script], check=True)
    run = subprocess.run(
        ["bash", script], env={**os.environ, "PYTHON": sys.executable}, capture_output=True, text=True
    )
    assert run.returncode == 1
    assert run.stderr == "bench/gpu.sh: there is no NVIDIA GPU: torch sees no CUDA device\n"


def test_tune_compiles(tmp_path: Path) -> None:
    """And spills nothing: a shape that does would only be slow."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        assert not os.environ.get("CI"), "CI needs nvcc"
        pytest.skip("nvcc is not installed")
    flags = ["-std=c++17", "-O3", "-fmad=false", "-arch=sm_90", "-Xptxas", "-v", "-I", ROOT / "csrc"]
    command = [nvcc, *flags, ROOT / "bench" / "tune.cu", "-o", tmp_path / "tune"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    spills = re.findall(r"(\d+) bytes spill stores", run.stderr)
    assert len(spills) > 40
    assert set(spills) == {"0"}
    if not torch.cuda.is_available():
        run = subprocess.run([tmp_path / "tune"], capture_output=True, text=True)
        assert run.returncode == 1
        assert "cudaMalloc" in run.stderr
