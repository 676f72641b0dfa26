"""What `bench/gpu.py` does next after what it found: the rules of bench/gpu_plan.py, over a fake GPU."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import cuda_harness
import danlu
import gpu
import gpu_overlap
import gpu_plan
import gpu_smoke
import gpu_stages
from danlu.backends import BACKENDS
from emulated import AVAILABLE
from fake_gpu import FakeGpu
from fake_stages import (  # noqa: F401  fixtures
    RIGHT,
    WRONG,
    answer,
    emulated_kernels,
    fake_gpu,
    small_stages,
)
from gpu_plan import Planned

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="the emulator gives the bandwidth ceiling")

FEW = ("environment", "smoke", "warm", "ceiling", "first", "first_reductions", "tests", "shapes", "ncu")
BROKEN = {"check": "lion bfloat16", "right": False, "error": "an illegal memory access\n", "unusable": True}


@pytest.fixture(name="stages")
def stages_of_a_run(
    small: FakeGpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., dict[str, Any]]:
    """Runs some stages, given what the smoke tests of both engines answer."""

    def stages(names: tuple[str, ...] = (*FEW, "memcheck"), **answers: Any) -> dict[str, Any]:
        asked = answer(monkeypatch, **answers)
        monkeypatch.setattr(gpu, "STAGES", {name: gpu_stages.STAGES[name] for name in names})
        gpu.main(["--out", str(tmp_path)])
        found: dict[str, Any] = json.loads((tmp_path / "gpu.json").read_text())["stages"]
        assert set(found) == set(names)
        return {"asked": asked, **found}

    def measure(place: object, workload: object, chosen: Any, *_: object) -> dict[str, Any]:
        rows = [{"name": c.id, "failed": "not measured"} for c in chosen]
        return {"id": "x", "title": "x", "contenders": rows, "pairs": []}

    monkeypatch.setattr(gpu_stages, "measure", measure)
    monkeypatch.setattr(gpu, "plot", lambda *_: None)
    monkeypatch.setattr(cuda_harness, "free", lambda: None)
    monkeypatch.setattr(gpu_plan, "SHARE", 0.0)
    return stages


def performed(stages: dict[str, Any]) -> list[str]:
    return [name for name, entry in stages.items() if name != "asked" and "skipped" not in entry]


def contenders_of(stage: dict[str, Any]) -> set[str]:
    return {row["name"] for row in stage["result"]["contenders"]}


def test_all_is_right(stages: Callable[..., dict[str, Any]]) -> None:
    found = stages()
    assert performed(found) == [*FEW, "memcheck"]
    assert "adamw-triton" in contenders_of(found["first"])


def test_wrong_bits_in_both_engines_stop_the_run(
    stages: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    found = stages(cuda=(1, RIGHT, WRONG), triton=(1, WRONG))
    assert performed(found) == ["environment", "smoke"]
    assert found["smoke"]["result"]["cuda"]["checks"] == [RIGHT, WRONG]
    assert found["tests"]["skipped"] == "nothing is measured: cuda: wrong bits, triton: wrong bits"
    assert found["asked"] == ["smoke-cuda", "smoke-triton"]
    out = capsys.readouterr().out
    assert "cuda: 1 of 2 first checks right, WRONG BITS: not measured" in out
    assert WRONG["differences"][0] in out  # type: ignore[index]


@pytest.mark.parametrize(("engine", "other"), [("cuda", "triton"), ("triton", "cuda")])
def test_wrong_bits_in_one_engine_leave_the_other(
    engine: str, other: str, stages: Callable[..., dict[str, Any]]
) -> None:
    found = stages(**{engine: (1, WRONG)})
    measured = contenders_of(found["first"])
    assert "torch-adamw" in measured
    assert ("adamw-triton" in measured) == (other == "triton")
    assert ("adamw" in measured) == (other == "cuda")
    assert "result" in found["tests"]
    of_cuda = {"ceiling", "first_reductions", "shapes", "ncu"}
    skipped = {name for name in FEW if "skipped" in found[name]}
    assert skipped == (of_cuda if engine == "cuda" else set())
    assert all(found[name]["skipped"] == "cuda: wrong bits" for name in skipped)


def test_an_illegal_address_brings_memcheck(stages: Callable[..., dict[str, Any]]) -> None:
    """Instead of measuring that engine; the tests are next, which name more."""
    found = stages(cuda=(gpu_smoke.UNUSABLE, BROKEN))
    assert performed(found) == ["environment", "smoke", "memcheck", "tests", "warm", "first"]
    assert found["first_reductions"]["skipped"] == "cuda: unusable"
    assert "adamw" not in contenders_of(found["first"])


def test_an_illegal_address_beside_wrong_bits(stages: Callable[..., dict[str, Any]]) -> None:
    found = stages(cuda=(gpu_smoke.UNUSABLE, BROKEN), triton=(1, WRONG))
    assert performed(found) == ["environment", "smoke", "memcheck"]


def test_a_stage_that_makes_cuda_unusable_brings_memcheck(
    stages: Callable[..., dict[str, Any]], small: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(_: object) -> None:
        small.broken = True

    def execv(path: str, arguments: list[str]) -> None:
        small.broken = False
        gpu.main(arguments[2:])
        raise SystemExit

    monkeypatch.setattr(os, "execv", execv)
    monkeypatch.setitem(gpu_stages.STAGES, "ceiling", Planned(breaks, 0, 9))
    names = ("environment", "smoke", "ceiling", "first", "tests", "memcheck")
    with pytest.raises(SystemExit):
        stages(names)
    seen = json.loads((gpu_stages.OUT / "gpu.json").read_text())["stages"]
    assert list(seen) == ["environment", "smoke", "ceiling", "memcheck", "tests", "first"]


def test_without_first_checks_nothing_is_measured(
    stages: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(_: object) -> None:
        raise OSError("no such program")

    monkeypatch.setitem(gpu_stages.STAGES, "smoke", Planned(fails, 0, 9))
    found = stages()
    assert performed(found) == ["environment", "smoke"]
    assert found["first"]["skipped"] == "nothing is measured: cuda: failed, triton: failed"


def test_a_smoke_test_that_says_nothing_is_no_proof(stages: Callable[..., dict[str, Any]]) -> None:
    found = stages(cuda=(0,), triton=(None, RIGHT))
    assert {name: one["fault"] for name, one in found["smoke"]["result"].items()} == {
        "cuda": "failed",
        "triton": "failed",
    }
    assert performed(found) == ["environment", "smoke"]


def test_a_process_that_dies_of_an_illegal_address() -> None:
    said = "terminate called: CUDA error: an illegal memory access was encountered"
    assert gpu_plan.fault(134, [RIGHT], said) == "unusable"
    assert gpu_plan.fault(134, [RIGHT], "out of memory") == "failed"
    assert gpu_plan.fault(0, [RIGHT], said) is None


@pytest.mark.parametrize("share", [0.84, 0.86])
def test_below_the_ceiling_shapes_and_ncu_come_first(
    share: float, stages: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    row = {"name": "adamw", "share_of_ceiling": {"median": share}}
    others = [{"name": name, "share_of_ceiling": {"median": 0.5}} for name in ("torch-adamw", "adamw-triton")]
    failed = {"name": "lion", "failed": "no"}
    first = {"contenders": [row, *others, failed]}
    monkeypatch.setattr(gpu_plan, "SHARE", 0.85)
    monkeypatch.setitem(gpu_stages.STAGES, "first", Planned(lambda _: first, 0, 9))
    found = stages(("environment", "smoke", "first", "first_reductions", "tests", "shapes", "ncu"))
    late = ["first_reductions", "tests"]
    sooner = ["shapes", "ncu"]
    assert performed(found)[3:] == ([*sooner, *late] if share < 0.85 else [*late, *sooner])


def test_a_stage_needs_its_time(
    stages: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shorter one after it is begun all the same."""
    monkeypatch.setenv("DANLU_SECONDS", "30")  # 15 of them for the end
    monkeypatch.setitem(gpu_stages.STAGES, "shapes", Planned(lambda _: [], 1, 9))
    found = stages(("environment", "tests", "shapes"))
    assert found["tests"]["skipped"].endswith("s are left, it needs 20 s")
    assert found["shapes"]["result"] == []


def test_chosen_stages(small: FakeGpu, tmp_path: Path) -> None:
    gpu.main(["--out", str(tmp_path), "--stages", "ncu"])
    found = json.loads((tmp_path / "gpu.json").read_text())["stages"]
    assert list(found) == ["environment", "smoke", "warm", "ncu"]
    with pytest.raises(SystemExit, match=r"--stages: there is no nc; there are environment, smoke"):
        gpu.main(["--out", str(tmp_path), "--stages", "nc"])


def test_overlap_is_turned_off_where_it_alone_is_wrong(
    stages: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DANLU_OVERLAP", "1")
    cuda: Any = BACKENDS["cuda"]
    monkeypatch.setattr(cuda, "dependent_launches", True)
    without = {**WRONG, "check": "lamb", "right_without_overlap": True}
    found = stages(cuda=(1, RIGHT, without))
    assert found["smoke"]["result"]["cuda"]["overlap"] == "wrong, turned off"
    assert performed(found) == [*FEW, "memcheck"]
    assert (os.environ["DANLU_OVERLAP"], cuda.dependent_launches) == ("0", False)
    assert gpu_overlap.saved([], 1) == []
    # but not where more is wrong
    assert gpu_plan.fault(1, [without, WRONG], "") == "wrong bits"
    assert gpu_plan.fault(1, [{**without, "right_without_overlap": False}], "") == "wrong bits"


def test_first_checks_are_right_in_the_emulator(
    kernels: FakeGpu, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_smoke, "SHAPES", [(33, 65), (7,)])
    found = list(gpu_smoke.checks("cuda", "cpu"))
    assert [check["check"] for check in found] == [
        *(f"{rule} {dtype}" for rule in ("lion", "adamw", "adax") for dtype in ("float32", "bfloat16")),
        *("lion in a graph", "lamb", "adafactor"),
    ]
    assert all(check["right"] for check in found), found
    monkeypatch.setattr(gpu_smoke, "checks", lambda _: iter([RIGHT, WRONG, BROKEN, RIGHT]))
    assert gpu_smoke.main(["cuda"]) == gpu_smoke.UNUSABLE
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == [RIGHT, WRONG, BROKEN]


def test_first_checks_find_one_wrong_bit(kernels: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a sum that is off by more than its bound, another backend, and an error."""
    monkeypatch.setattr(gpu_smoke, "SHAPES", [(33, 65), (7,)])
    everything = gpu_smoke.everything

    def off(optimizer: danlu.FusedOptimizer, model: Any) -> dict[str, Any]:
        found = everything(optimizer, model)
        (backend,) = {row.backend for row in optimizer.backend_report()}
        if backend == "cuda":
            found["parameter 1"][3] *= 1 + 1e-4
        return found

    monkeypatch.setattr(gpu_smoke, "everything", off)
    found = {check["check"]: check for check in gpu_smoke.checks("cuda", "cpu")}
    right = [check["right"] for check in found.values()]
    assert right == [False, True] * 3 + [False] * 3  # bf16 does not hold what is off
    (line,) = found["lion float32"]["differences"]
    assert line.startswith("parameter 1: 1 of 7 differ: [3] 0x")
    (line,) = found["lamb"]["differences"]
    assert "of its norm off, at most 1e-06 is right" in line
    assert found["lamb"]["right_without_overlap"] is False
    cuda: Any = BACKENDS["cuda"]
    monkeypatch.setattr(cuda, "dependent_launches", True)

    def off_with_overlap(optimizer: danlu.FusedOptimizer, model: Any) -> dict[str, Any]:
        return off(optimizer, model) if cuda.dependent_launches else everything(optimizer, model)

    monkeypatch.setattr(gpu_smoke, "everything", off_with_overlap)
    (*_, lamb, _) = gpu_smoke.checks("cuda", "cpu")
    assert (lamb["right"], lamb["right_without_overlap"]) == (False, True)
    assert gpu_plan.fault(1, list(found.values()), "") == "wrong bits"
    monkeypatch.setattr(gpu_smoke, "everything", everything)
    taken = gpu_smoke.checks("triton", "cpu")  # which is the CPU's here
    monkeypatch.setattr(danlu.FusedOptimizer, "backend_report", lambda self: [])
    assert "asked for backend triton, took set()" in next(taken)["error"]


def test_what_is_near_and_what_is_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN is not near; two NaN are equal, another dtype is not."""
    found = {torch.float32: float("nan"), torch.float64: 1.0}
    monkeypatch.setattr(
        gpu_smoke, "stepped", lambda make, dtype, *_, **__: {"x": torch.tensor([found[dtype]], dtype=dtype)}
    )
    off = "x: nan of its norm off, at most 1e-06 is right"
    assert gpu_smoke.near_float64(danlu.LAMB, "cuda", "cpu") == [off]
    a = torch.tensor([float("nan"), 0.0, 1.0])
    b = torch.tensor([-float("nan"), -0.0, 1.0])
    assert gpu_smoke.unequal("x", a, b) == ["x: 1 of 3 differ: [1] 0x0 for 0x80000000"]
    assert gpu_smoke.unequal("x", a.bfloat16(), a) == ["x: torch.bfloat16 (3,), wanted torch.float32 (3,)"]
    assert gpu_smoke.unequal("x", a[1:], b[2:])
