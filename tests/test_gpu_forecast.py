"""The page that says what a GPU should reach is that of the built module."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import gpu_forecast
import sass_counts
from gpu_forecast import CARDS, STEPS, Card, Forecast, Found
from machine_code import built

FAST = Card("fast", 132e9 * 4 / gpu_forecast.COPIED, 132, 1e9)  # 4 bytes a clock for each multiprocessor


def found(**changes: float) -> Found:
    settings = dict(registers=64, shared=0, instructions=1.0, loaded=256)
    return Found(**{**settings, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("registers", "shared", "blocks"),
    [(32, 0, 8), (33, 0, 6), (64, 0, 4), (65, 0, 3), (80, 0, 3), (81, 0, 2), (128, 0, 2), (32, 100_000, 2)],
)
def test_resident_blocks(registers: int, shared: int, blocks: int) -> None:
    assert found(registers=registers, shared=shared).blocks == blocks


def test_the_longest_time_is_the_bound() -> None:
    memory = Forecast.of(FAST, found(), 20)
    assert memory.seconds == memory.memory == pytest.approx(5e-9)
    assert memory.share == 1
    issue = Forecast.of(FAST, found(instructions=2 * 5 * 128 * gpu_forecast.ISSUED), 20)
    assert issue.seconds == issue.issue == pytest.approx(1e-8)
    assert issue.share == pytest.approx(0.5)
    # 4 blocks of 256 threads with 2 bytes each in flight
    latency = Forecast.of(FAST, found(loaded=2), 20)
    assert latency.seconds == latency.latency == pytest.approx(20 * gpu_forecast.LATENCY / 2048)


def test_the_page_is_that_of_the_built_module() -> None:
    """Its numbers too, if the same compiler has assembled it."""
    library = built.library()
    release = sass_counts.compiler(library)
    want = gpu_forecast.page(gpu_forecast.read(library), release)
    have = gpu_forecast.PAGE.read_text()
    hint = "run `python bench/gpu_forecast.py`"
    if f"(nvcc {release})" in have:
        assert have == want, hint
    else:
        assert re.sub(r"[\d.]+", "", have) == re.sub(r"[\d.]+", "", want), hint
    assert have.count(gpu_forecast.NOT_MEASURED) == len(STEPS)


def test_bytes_are_those_of_the_benchmarks() -> None:
    """What the passes of a step move is what its share of the ceiling is of."""
    from contenders import ON_CUDA

    known = {contender.id: contender.bytes for contender in ON_CUDA}
    for step in STEPS:
        assert sum(one.memory for one in step.passes) == known[step.contender], step.name


def test_a_run_stands_beside_the_forecast(tmp_path: Path) -> None:
    row = {"name": "lion", "kernel_share_of_ceiling": {"median": 0.934}}
    stages = {"first": {"result": [{"contenders": [row, {"name": "adamw", "failed": "no"}]}]}}
    stages["tests"] = {"error": "interrupted"}  # type: ignore[assignment]
    (tmp_path / "gpu.json").write_text(json.dumps({"stages": stages}))
    measured = gpu_forecast.shares(json.loads((tmp_path / "gpu.json").read_text()))
    assert measured == {"lion": 0.934}
    codes = {one.label: found() for step in STEPS for one in step.passes}
    lines = gpu_forecast.page(codes, "13.0", measured).splitlines()
    (lion,) = [line for line in lines if line.startswith("| Lion fp32")]
    assert lion.endswith("| 93% |")
    assert sum(line.endswith(f"| {gpu_forecast.NOT_MEASURED} |") for line in lines) == len(STEPS) - 1
    assert all(card.name in "\n".join(lines) for card in CARDS)
