"""The stages of `bench/gpu.py` over a fake GPU."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import bars
import contenders
import gpu
import gpu_background
import gpu_groups
import gpu_norm
import gpu_plan
import gpu_report
import gpu_run
import gpu_stages
import gpu_tests
from commands import limited
from danlu.backends import cuda as cuda_backend
from emulated import AVAILABLE, emulated
from fake_gpu import FakeGpu
from fake_stages import TINIER, TINY, emulated_kernels, fake_gpu, small_stages  # noqa: F401  fixtures
from gpu_plan import Planned
from harness import ROOT, Model

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="the emulator gives the bandwidth ceiling")


def plan(patch: pytest.MonkeyPatch, **stages: Any) -> None:
    """Other stages in their place."""
    patch.setattr(gpu, "STAGES", {name: Planned(stage, 1, 60) for name, stage in stages.items()})


@pytest.mark.usefixtures("one_thread")
def test_all_stages(
    small: FakeGpu, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_plan, "SHARE", 0.0)  # a CPU has no bandwidth to reach
    status = gpu.main(["--out", str(tmp_path)])
    stages = json.loads((tmp_path / "gpu.json").read_text())["stages"]
    assert list(stages) == list(gpu_stages.STAGES)
    assert [name for name, entry in stages.items() if "result" not in entry] == []
    assert status == 1  # a test failed
    assert stages["tests"]["result"]["counts"] == {"failed": 1, "passed": 1}
    assert [measured["id"] for measured in stages["models"]["result"]] == ["tiny", "tinier"]
    found = {name: entry["result"] for name, entry in stages.items()}
    assert [row["name"] for row in found["first"]["contenders"]] == [c.id for c in gpu_stages.FIRST]
    assert len(gpu_stages.FIRST) == 8
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
    assert len(found["overlap"]) == 2 * 2 * 2
    assert all(row["saves"]["median"] > 0 for row in found["overlap"])
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
    first, second = found["ncu"]["kernels"]
    assert first["metrics"] == {
        "GPU Speed Of Light Throughput: DRAM Throughput": ["91.2", "%"],
        "Occupancy: Registers Per Thread": ["64", "register/thread"],
    }
    assert second["kernel"] == "void apply_kernel<Lion>"
    assert (tmp_path / "gpu.png").stat().st_size > 0
    assert {path.name for path in tmp_path.iterdir()} == {"gpu.json", "gpu.png", "tests.jsonl"}
    out = capsys.readouterr().out
    assert "test_x.py::test_a: assert 1 == 2" in out
    assert "best 256/8/4/4096 1.900 ms" in out
    assert "cannot be shown" not in out
    for shown in (
        r"lamb  .* of the ceiling for 44 B/param >= 0\.85: (NOT )?REACHED",
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
        return {"name": name, "share_of_ceiling": {"median": share, "low": share - 0.1, "high": share + 0.1}}

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
        "lamb-bf16": ["0.86 (0.76-0.96) of the ceiling for 28 B/param >= 0.85: reached"],
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
    rows = list(gpu_groups.swept([TINY], 2))
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

    plan(monkeypatch, a=fails, environment=gpu_stages.environment)
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
    plan(monkeypatch, breaks=breaks, tests=second)
    with pytest.raises(SystemExit, match=r"^0$"):
        gpu.main(["--out", str(tmp_path)])
    stages = json.loads((tmp_path / "gpu.json").read_text())["stages"]
    assert stages["breaks"]["result"] == "done"
    assert stages["breaks"]["unusable"]
    assert "result" in stages["tests"]


def test_the_time_is_up(small: FakeGpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def long(_: object) -> None:
        try:
            time.sleep(30)
        except Exception:
            pytest.fail("a guard of a contender would have swallowed it")

    monkeypatch.setenv("DANLU_SECONDS", "1.6")
    monkeypatch.setattr(gpu_run, "FINISH", 0.1)
    plan(monkeypatch, long=long, next=long)
    start = time.time()
    gpu.main(["--out", str(tmp_path)])
    assert time.time() - start < 10
    stages = json.loads((tmp_path / "gpu.json").read_text())["stages"]
    assert "OutOfTimeError" in stages["long"]["error"]
    assert stages["next"]["skipped"] == "0 s are left, it needs 1 s"


def test_a_stage_has_a_limit_of_its_own(
    small: FakeGpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it yielded until then is kept."""

    def slow(_: object) -> Iterator[int]:
        yield 7
        time.sleep(30)

    monkeypatch.setattr(gpu, "STAGES", {"slow": Planned(slow, 0, 0.2), "next": Planned(lambda _: 8, 0, 9)})
    gpu.main(["--out", str(tmp_path)])
    stages = json.loads((tmp_path / "gpu.json").read_text())["stages"]
    assert stages["slow"]["result"] == [7]
    assert "OutOfTimeError" in stages["slow"]["error"]
    assert "unfinished" not in stages["slow"]
    assert stages["next"]["result"] == 8


def test_a_write_that_is_cut_off_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = gpu_run.Run(tmp_path / "gpu.json", time.time())
    run.perform("first", lambda _: [1, 2, 3])
    write = Path.write_text

    def cut_off(path: Path, text: str) -> None:
        write(path, text[: len(text) // 2])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", cut_off)
    with pytest.raises(KeyboardInterrupt):
        run.perform("second", lambda _: [4])
    stages = json.loads((tmp_path / "gpu.json").read_text())["stages"]
    assert list(stages) == ["first"]
    resumed = gpu_run.Run(tmp_path / "gpu.json", time.time(), resume=True)
    assert resumed.results() == {"first": [1, 2, 3]}


def test_killed_at_any_moment(tmp_path: Path) -> None:
    """What it had written is whole, and nothing else is left but a draft."""
    script = (
        "import sys, time, pathlib, gpu_run\n"
        "run = gpu_run.Run(pathlib.Path(sys.argv[1]), time.time())\n"
        "for i in range(10**9): run.perform('stage', lambda _: [i] * 100_000)\n"
    )
    path = tmp_path / "gpu.json"
    for i in range(4):
        command = [sys.executable, "-c", script, str(path)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT / "bench")}
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            for _ in range(1 + i % 2):  # of the first stage and of its end
                process.stdout.readline()
            time.sleep(0.013 * i)
            process.kill()
        if path.exists():
            assert len(json.loads(path.read_text())["stages"]["stage"]["result"]) == 100_000
    assert {found.name for found in tmp_path.iterdir()} <= {"gpu.json", "gpu.draft"}
    assert path.exists()


def test_without_a_plot_there_is_a_table(
    small: FakeGpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    plan(monkeypatch, environment=gpu_stages.environment, first=gpu_stages.first)
    gpu.main(["--out", str(tmp_path)])
    said = capsys.readouterr()
    assert "import of matplotlib halted" in said.err
    assert re.search(r"^adamw  .*\nadamw-bf16 ", said.out, re.MULTILINE)
    assert [found.name for found in tmp_path.iterdir()] == ["gpu.json"]


@pytest.mark.parametrize("cores", [1, 2])
def test_outcomes_of_tests_in_processes_of_their_own(
    cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that crashes ends all where there is one process, but what was known before is."""
    own = os.sched_getaffinity(0)
    if len(own) < cores:
        assert not os.environ.get("CI"), "CI has two cores"
        pytest.skip("needs two cores")
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
        f"def {gpu_tests.LONGEST[0]}(): pass\n"
    )
    monkeypatch.setattr(gpu_stages, "TESTS", tmp_path)
    monkeypatch.setattr(gpu_stages, "OUT", tmp_path / "out")
    os.sched_setaffinity(0, sorted(own)[:cores])
    try:
        result = gpu_stages.tests({})
    finally:
        os.sched_setaffinity(0, own)
    # in the order in which they ended, which is chance where there are two workers
    failures = {f["test"].split("::")[1]: f["message"] for f in result["failures"]}
    assert result["counts"] == {"passed": 2, "failed": 1 + cores, "skipped": 1}
    assert set(failures) == {"test_fails", "test_error"} | ({"test_crashes"} if cores > 1 else set())
    assert "assert 1 == 2" in failures["test_fails"]
    assert cores == 1 or "crashed while running" in failures["test_crashes"]
    assert result["skipped"] == {"Skipped: not today": 1}
    assert result["exit_status"] == (-6 if cores == 1 else 1)
    lines = [json.loads(line) for line in (tmp_path / "out" / "tests.jsonl").read_text().splitlines()]
    assert {line["message"] for line in lines if line["outcome"] == "passed"} == {""}
    assert cores > 1 or gpu_tests.LONGEST[0] in lines[0]["test"]


def test_the_longest_tests_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each goes to a worker as it is free; without xdist they run in one process."""
    names = ["test_a", "test_rounding_to_bf16", "test_b", gpu_tests.LONGEST[0]]
    items: Any = [SimpleNamespace(name=f"{name}[x]", originalname=name) for name in names]
    gpu_tests.pytest_collection_modifyitems(items)
    assert [item.originalname for item in items] == [names[3], names[1], names[0], names[2]]
    found = (ROOT / "tests" / "gpu").glob("test_*.py")
    assert set(gpu_tests.LONGEST) <= set(re.findall(r"def (test_\w+)", "".join(p.read_text() for p in found)))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(16))
    assert gpu_tests.workers() == ["-n", "8", "--dist", "load", "--maxschedchunk", "1"]
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert gpu_tests.workers() == []


def test_commands_end_with_all_their_children() -> None:
    start = time.time()
    status, output = limited(["bash", "-c", "echo $X; (sleep 60; echo no)"], 1.0, X="yes")
    assert (status, output) == (None, "yes\n")
    assert time.time() - start < 20
    assert limited(["bash", "-c", "exit 9"], 10.0) == (9, "")
    _, child = limited(["bash", "-c", "sleep 60 & echo $!; wait"], 0.5)
    state = Path(f"/proc/{child.strip()}/stat")
    for _ in range(100):
        if not state.exists() or ") Z " in state.read_text():
            return
        time.sleep(0.02)
    pytest.fail("its child runs on")


def test_a_command_that_fails_is_an_error(small: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_background, "finish", lambda *_: (1, "no such architecture"))
    with pytest.raises(RuntimeError, match="tune: exit status 1: no such architecture"):
        gpu_stages.shapes({})


@pytest.mark.parametrize("status", [0, 9, None, 1])
def test_memcheck_tells_its_outcome(
    status: int | None, small: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: "/bin/tool")
    monkeypatch.setattr(gpu_stages, "limited", lambda *_, **env: (status, str(env)))
    result = gpu_stages.memcheck({})
    said = {0: "no errors", 9: "ERRORS", None: "not done after 90 s", 1: "exit status 1"}
    assert result == {"outcome": said[status], "output": "{'PYTORCH_NO_CUDA_MEMORY_CACHING': '1'}"}
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert "not installed" in gpu_stages.memcheck({})["outcome"]
