"""The benchmarks measure what they say: workloads, bytes, memory, the plain Lion to compare with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import contenders
import danlu
import grad_norm
import harness
import lazy_rows
import plans
import step_time
from baselines import PlainLion
from danlu import _cpu
from workloads import Workload

TINY = Workload("tiny", "a few tensors", [(40, 30), (30,), (7,)])


def model(dtype: torch.dtype = torch.float32) -> harness.Model:
    made = harness.Model(TINY, dtype)
    made.backward()
    return made


def test_workloads() -> None:
    gpt2, small = step_time.WORKLOADS["gpt2-small"], step_time.WORKLOADS["many-small"]
    llama = step_time.WORKLOADS["llama-3.2-1b"]
    assert (len(gpt2.shapes), gpt2.elements) == (148, 124_439_808)
    assert (len(small.shapes), round(small.elements / 1e6, 1)) == (5000, 27.7)
    assert (len(llama.shapes), llama.elements) == (146, 1_235_814_400)
    assert all(shape[1] == 64 for shape in small.shapes)
    assert gpt2.single_elements().elements == 148


def test_gradients_are_fresh_at_every_step() -> None:
    made = model()
    old = [p.grad for p in made.parameters]
    made.backward()
    for p, g in zip(made.parameters, old, strict=True):
        assert p.grad is not None
        assert g is not None
        assert torch.equal(p.grad, g)
        assert p.grad.data_ptr() != g.data_ptr()


@pytest.mark.parametrize("contender", contenders.ON_CPU, ids=lambda c: c.id)
def test_bytes_that_a_step_has_to_touch(contender: contenders.Contender) -> None:
    parameters = model(contender.dtype).parameters
    optimizer = contender.make(parameters)
    optimizer.step()
    p = parameters[0]
    written = [p, *(x for x in optimizer.state[p].values() if torch.is_tensor(x) and x.shape == p.shape)]
    assert p.grad is not None
    assert contender.written == len(written)
    once = 2 * sum(x.element_size() for x in written) + p.grad.element_size()
    assert contender.bytes == once + contender.read_again
    if contender.read_again:  # the pass before the update reads all that it needs, and writes nothing
        assert contender.read_again == sum(x.element_size() for x in written) + p.grad.element_size()


@pytest.mark.parametrize("foreach", [False, True])
def test_plain_lion_is_lion(foreach: bool) -> None:
    plain, fused = model(), model()
    hyper = dict(lr=1e-3, betas=(0.9, 0.98), weight_decay=0.1)
    optimizers = PlainLion(plain.parameters, foreach=foreach, **hyper), danlu.Lion(fused.parameters, **hyper)
    for _ in range(5):
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip(plain.parameters, fused.parameters, strict=True):
        torch.testing.assert_close(a, b)


def test_peak_of_what_a_step_allocates() -> None:
    def step() -> None:
        a = torch.zeros(1000)
        b = a + a
        del a
        del b
        torch.zeros(500)

    assert harness.peak_allocated(step) == 8000


def test_danlu_allocates_nothing() -> None:
    """Beyond Python objects: what torch's allocators know of, and their peak in a step of every optimizer."""
    for contender in contenders.ON_CPU:
        if contender.make(model().parameters).__module__.startswith("danlu"):
            bench = harness.OnCpu(TINY, {contender.dtype})
            optimizer = contender.make(model().parameters)
            optimizer.step()
            scratch = harness.scratch_bytes(optimizer)
            assert bench.memory(contender)["peak_extra_bytes"] == scratch
            assert (scratch > 0) == optimizer.reduces


def test_quartiles() -> None:
    assert harness.Spread.of([5.0, 1.0, 4.0, 2.0, 3.0]) == harness.Spread(3.0, 2.0, 4.0)
    assert harness.Spread.of([7.0]) == harness.Spread(7.0, 7.0, 7.0)


def test_a_whole_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(step_time, "WORKLOADS", {"tiny": TINY})
    step_time.main(["--rounds", "2", "--workloads", "tiny", "--out", str(tmp_path)])
    results = json.loads((tmp_path / "step_time.json").read_text())
    (measured,) = results["workloads"]
    rows = {row["name"]: row for row in measured["contenders"]}
    assert list(rows) == [c.id for c in contenders.ON_CPU]
    for row in rows.values():
        assert 0 < row["ms"]["low"] <= row["ms"]["median"] <= row["ms"]["high"]
        if "kernel_ms" in row:
            assert 0 < row["kernel_ms"]["median"] < row["ms"]["median"]
    assert rows["torch-adamw"]["ratio"]["median"] == 1
    assert rows["lion"]["state_bytes_per_parameter"] == pytest.approx(4 + 3 * 4 / TINY.elements)
    assert (tmp_path / "step_time.png").stat().st_size > 0
    assert "tiger" in capsys.readouterr().out


def test_passes_of_wrappers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(step_time, "gpt2_small", lambda: TINY)
    monkeypatch.setattr(lazy_rows, "SHAPE", (200, 16))
    monkeypatch.setattr(lazy_rows, "LISTED", 10)
    step_time.main(["--wrappers", "--rounds", "2", "--out", str(tmp_path)])
    results = json.loads((tmp_path / "wrappers.json").read_text())
    (measured,) = results["workloads"]
    assert [row["name"] for row in measured["passes"]] == ["accumulation", "lookahead", "ema"]
    for row in measured["passes"]:
        assert 0 < row["ms"]["low"] <= row["ms"]["median"] <= row["ms"]["high"]
        assert 0 < row["share_of_ceiling"]["low"] <= row["share_of_ceiling"]["high"]
    ways = results["lazy_rows"]["ways"]
    assert {way["optimizer"] for way in ways} == {"Lion", "AdamW"}
    for way in ways:
        assert all(0 < way[name]["low"] <= way[name]["high"] for name in ("ms", "ratio", "share"))
    assert {way["ratio"]["median"] for way in ways if way["step"] == "all rows"} == {1.0}
    printed = capsys.readouterr().out
    assert "of AdamW's step" in printed
    assert "10 of 200 rows of 16 elements" in printed
    with pytest.raises(SystemExit):
        step_time.main(["--wrappers", "--workloads", "many-small"])


def test_wrong_names_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        step_time.main(["--contenders", "lion,no-such"])
    assert "got 'no-such'" in capsys.readouterr().err


def test_lazy_rows(capsys: pytest.CaptureFixture[str]) -> None:
    lazy_rows.main(["--rows", "300", "--columns", "16", "--listed", "10", "--rounds", "1"])
    assert "10 of 300 rows of 16 elements" in capsys.readouterr().out


def test_norms_of_gradients(capsys: pytest.CaptureFixture[str]) -> None:
    grad_norm.main(["--rounds", "2"], TINY)
    assert capsys.readouterr().out.count("danlu, max_grad_norm") == 3
    made = model()
    squares, total, clipped = (way() for way in grad_norm.ways_to_norm(made).values())
    assert squares == pytest.approx(float(total) ** 2, rel=1e-6)
    assert float(total) == pytest.approx(float(clipped), rel=1e-6)
    bits = torch.tensor([1.5, -2.0, 7.0])
    wanted = 0
    for number in bits.view(torch.int32).tolist():
        wanted ^= number & 0xFFFFFFFF
    assert _cpu.read_through(bits.data_ptr(), 3, 2) == wanted


def test_host_work_of_plans(capsys: pytest.CaptureFixture[str]) -> None:
    plans.main(["--rounds", "2"], (2, 30))
    assert capsys.readouterr().out.count("(") == 2 * len(plans.WAYS)
    making, whole, parts = plans.ways_of_work(3)
    assert len(making()._stepped) == 3  # type: ignore[attr-defined]
    whole()
    for _ in range(2):
        parts()
