"""Runs the tests of the Triton backend in processes of their own: kernels are interpreted there or never."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import danlu
from selection import left_elsewhere
from training import some_params

TESTS = Path(__file__).parent


class Run(NamedTuple):
    paths: list[str]
    all_tests: str  # pytest's -k, with --all
    tests: str  # without
    least: tuple[int, int]  # how many tests these find at least


def of(*names: str) -> list[str]:
    return [f"tests/test_{name}.py" for name in names]


RUNS = {
    # everything in tests/interpreted but what the next one has
    "bits": Run(
        ["tests/interpreted", "--ignore=tests/interpreted/test_triton_reducing.py"], "", "", (164, 100)
    ),
    "rules that reduce": Run(["tests/interpreted/test_triton_reducing.py"], "", "", (74, 30)),
    # the tests with the fixture `backend`; of rules that reduce, which take seconds each, one
    "what every backend must do": Run(
        of("gradient_scale", "torch_contract", "checkpoints"),
        "triton and not (adax or adafactor or amos or tiger-matrix or tiger-rows)",
        "triton and not (adax or adafactor or amos or tiger or layer or adam-)",
        (195, 100),
    ),
    # of a rule with one state, and of one that accumulates
    "changes between steps": Run(
        of("plan_changes", "shared_memory", "group_by_group"),
        "triton and (lion or tiger-accumulate)",
        "triton and (lion or tiger-accumulate) and not layer",
        (105, 60),
    ),
    # formats that only tests have
    "formats": Run(of("formats"), "triton", "triton", (16, 16)),
    # the bits of accumulation, Lookahead and EMA, over all combinations of dtypes
    "passes around a step": Run(of("wrappers"), "the_bits", "the_bits", (32, 32)),
}


@pytest.fixture(scope="module")
def started(
    tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config
) -> dict[str, tuple[subprocess.Popen[bytes], Path]]:
    """All of them at once: each keeps one core busy."""
    found = {}
    everything = bool(pytestconfig.getoption("--all"))
    for name, wanted in RUNS.items():
        output = tmp_path_factory.mktemp("interpreted") / "output"
        with output.open("wb") as file:
            chosen = wanted.all_tests if everything else wanted.tests
            options = ["-k", chosen, *(["--all"] if everything else [])]
            command = [sys.executable, "-m", "pytest", "-q", *options, *wanted.paths]
            env = {**os.environ, "TRITON_INTERPRET": "1"}
            run = subprocess.Popen(command, cwd=TESTS.parent, env=env, stdout=file, stderr=subprocess.STDOUT)
        found[name] = (run, output)
    return found


@pytest.mark.parametrize("name", RUNS)
def test_interpreted(
    name: str, started: dict[str, tuple[subprocess.Popen[bytes], Path]], pytestconfig: pytest.Config
) -> None:
    run, output = started[name]
    status, text = run.wait(), output.read_text()
    assert status == 0, text[-3000:]
    assert "skipped" not in text.splitlines()[-1]
    passed = re.search(r"(\d+) passed", text)
    assert passed
    assert int(passed[1]) >= RUNS[name].least[0 if pytestconfig.getoption("--all") else 1]
    left_elsewhere(pytestconfig, text)


def test_elsewhere_it_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match=r"backend='triton' is not available: .*TRITON_INTERPRET=1"):
        danlu.Lion(some_params(), backend="triton")
