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

import bars
import contenders
import cuda_harness
import cuda_memory
import danlu
import gpu
import gpu_groups
import gpu_norm
import gpu_report
import gpu_stages
import lazy_rows
import memcheck
import rounds
import step_time
from danlu.backends import BACKENDS
from danlu.backends import cuda as cuda_backend
from emulated import AVAILABLE, emulated
from fake_gpu import EVENTS, FakeGpu
from harness import ROOT, Model
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
    monkeypatch.setattr(lazy_rows, "SHAPE", (90, 16))
    monkeypatch.setattr(lazy_rows, "LISTED", 10)
    monkeypatch.setattr(gpu_stages, "limited", commands)
    monkeypatch.setattr(torch, "compile", lambda step: step)  # the compiler takes its time
    return fake


@pytest.fixture
def kernels(fake: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    """The CUDA kernels in the emulator instead of the CPU's."""
    monkeypatch.setitem(BACKENDS, "cuda", emulated())
    monkeypatch.setattr(cuda_harness, "BACKEND", "cuda")
    emulated().native.reset()
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
    assert cuda_memory.peak_allocated(fake.step) == 500
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


def test_a_stream_of_more_bytes_than_arrays_stays_inside(
    fake: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As LAMB's, which reads all of them twice; the time is that of all bytes."""
    seen = []
    monkeypatch.setattr("danlu._cuda.stream", lambda *arguments: seen.append(arguments))
    monkeypatch.setattr(cuda_harness, "time_on_gpu", lambda step, host: (7.0, False))
    assert cuda_harness.CudaStream(1000).seconds(44 * 1000, 3) == pytest.approx(7 * 44 / 28)
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
    "contender", [c for c in contenders.ON_CUDA if c not in gpu_stages.COMPILED], ids=lambda c: c.id
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


def test_all_stages(small: FakeGpu, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = gpu.main(["--out", str(tmp_path)])
    stages = json.loads((tmp_path / "gpu.json").read_text())["stages"]
    assert list(stages) == list(gpu_stages.STAGES)
    assert [name for name, entry in stages.items() if "result" not in entry] == []
    assert status == 1  # a test failed
    assert stages["tests"]["result"]["counts"] == {"failed": 1, "passed": 1}
    assert [measured["id"] for measured in stages["models"]["result"]] == ["tiny", "tinier"]
    found = {name: entry["result"] for name, entry in stages.items()}
    for measured in (*found["models"], *found["reductions"], found["small_tensors"]):
        assert all(row["launches"] == 2 for row in measured["contenders"])
    assert {row["name"] for row in stages["zero_gradients"]["result"]} == {"adamw", "adax", "lion"}
    every = [(name, w.id) for w in (TINIER, TINY) for name in ("adamw", "adafactor", "lamb")]
    for name in ("cuda_graph", "profiles"):
        assert [(row["optimizer"], row["workload"]) for row in found[name]] == every
    assert found["cuda_graph"][0]["replay_ms"]["median"] > 0
    for measured in found["reductions"]:
        counts = {name: len(asked) for name, asked in measured["bars"].items()}
        kinds = [f"{kind}{by}" for kind in ("", "-bf16") for by in ("", "-triton")]
        assert counts == {f"{name}{k}": n for name, n in (("adafactor", 2), ("lamb", 1)) for k in kinds}
    assert len(found["gradient_norm"]) == 2 * 2 * 3
    assert all(row["share_of_reading"]["median"] > 0 for row in found["gradient_norm"])
    assert {row["best"] for row in found["groups"]} <= set(gpu_groups.sizes())
    ways = [*(f"rows, {how}" for how in ("listed", "listed in no order", "listed twice", "dense gradient"))]
    steps = ["all rows", *ways, "params, listed"]
    lazy = found["lazy_steps"]
    assert [(row["optimizer"], row["step"]) for row in lazy] == [
        (o, w) for o in ("Lion", "AdamW") for w in steps
    ]
    assert all(row["ms"]["median"] > 0 and row["ratio"]["median"] > 0 for row in lazy)
    assert len(found["host_time"]["contenders"]) == len(contenders.ON_CUDA) - 4
    assert [row["name"] for row in found["compiled_adafactor"]["contenders"]] == [
        "torch-adafactor-compile",
        "adafactor",
    ]
    assert (tmp_path / "gpu.png").stat().st_size > 0
    out = capsys.readouterr().out
    assert "test_x.py::test_a: assert 1 == 2" in out
    assert "best 256/8/4/4096 1.900 ms" in out
    assert "cannot be shown" not in out
    for shown in (
        r"lamb  .* of the stream for 44 B/param >= 0\.85: (NOT )?REACHED",
        r"adafactor  .* times torch's speed >= 5: .*; .* times 20 B/param in place <= 1\.35: ",
        r"norm, bfloat16 on tiny: cuda .* of reading >= 0\.9: .*; triton .*; torch get_total_norm",
        r"Lion on an embedding, ms \(times all rows\): all rows .*, rows, listed twice .*",
        r"adafactor's groups, float32 on tiny, .*: default .*, L2/4 .*; best ",
    ):
        assert re.search(shown, out, re.IGNORECASE), shown
    assert gpu_report.lines(stages)[-1].startswith("seconds: ")
    assert len(gpu_report.lines(stages)) <= gpu_report.MOST_LINES


def test_bars() -> None:
    def row(name: str, share: float) -> dict[str, Any]:
        return {"name": name, "share_of_stream": {"median": share, "low": share - 0.1, "high": share + 0.1}}

    ratio = {"median": 5.2, "low": 4.9, "high": 5.4}
    measured = {
        "contenders": [row("adafactor", 0.8), row("lamb-bf16", 0.86), {"name": "lamb", "failed": "no"}],
        "pairs": [
            {"name": "adafactor", "than": "torch-adafactor-foreach", "ratio": ratio},
            {"name": "lamb", "than": "torch-adafactor-foreach", "ratio": ratio},
        ],
    }
    found = {name: [bars.text(one) for one in asked] for name, asked in bars.of_steps(measured).items()}
    assert found == {
        "adafactor": [
            "5.20 (4.90-5.40) times torch's speed >= 5: reached",
            "1.50 (1.33-1.71) times 20 B/param in place <= 1.35: NOT REACHED",
        ],
        "lamb-bf16": ["0.86 (0.76-0.96) of the stream for 28 B/param >= 0.85: reached"],
    }
    assert not bars.bar("share", ratio, least=5.3)["reached"]
    assert bars.bar("time", ratio, most=5.3)["reached"]


def test_the_norm_and_what_it_is_compared_with(kernels: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    for dtype in gpu_norm.DTYPES:
        model = Model(TINY, dtype)
        model.hold_gradients()
        by_cuda, by_triton, by_torch = (float(way()) for way in gpu_norm.ways_to_norm(model).values())  # type: ignore[arg-type]
        assert by_cuda == pytest.approx(by_triton, rel=1e-12)
        assert by_cuda**0.5 == pytest.approx(by_torch, rel=1e-2)
        emulated().native.reset()
        emulated().native.machine().count_traffic()
        gpu_norm.reading(model)()
        assert emulated().native.machine().bytes_read == pytest.approx(
            sum(g.nbytes for g in model.gradients), abs=64
        )


def test_every_size_of_groups_is_used(kernels: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    plan = cuda_backend.reducing_tensors
    monkeypatch.setattr(
        cuda_backend, "reducing_tensors", lambda *arguments: seen.append(arguments[-1]) or plan(*arguments)
    )
    rows = gpu_groups.swept([TINY], 2)
    sizes = gpu_groups.sizes()
    assert seen == list(sizes.values()) * 2
    assert list(sizes) == ["default", "L2/4", "L2/2", "L2", "1 GB"]
    assert sizes["L2/2"] == 25 << 20
    for row in rows:
        assert row["sizes"][0]["by_default"] == {"median": 1, "low": 1, "high": 1}
        fastest = min(row["sizes"], key=lambda one: one["by_default"]["median"])
        assert row["best"] == fastest["size"]


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
    assert capsys.readouterr().out.count("{'cpu'}") == 2 * len(memcheck.OPTIMIZERS)


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
