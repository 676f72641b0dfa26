"""Runs the tests of the Triton backend in processes of their own: kernels are interpreted there or never."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import danlu
from selection import left_elsewhere
from training import some_params

TESTS = Path(__file__).parent


# pytest's arguments, how many tests they find at least, all of them and without --all
RUNS = {
    # everything in tests/interpreted but what the next one has
    "bits": (["tests/interpreted", "--ignore=tests/interpreted/test_triton_reducing.py"], (164, 100)),
    "rules that reduce": (["tests/interpreted/test_triton_reducing.py"], (74, 30)),
    # the tests with the fixture `backend`; of rules that reduce, which take seconds each, one
    "what every backend must do": (
        [
            *("-k", "triton and not (adax or adafactor or amos or tiger-matrix or tiger-rows)"),
            *(f"tests/test_{name}.py" for name in ("gradient_scale", "torch_contract", "checkpoints")),
        ],
        (195, 100),
    ),
    # of a rule with one state, and of one that accumulates
    "changes between steps": (
        [
            *("-k", "triton and (lion or tiger-accumulate)"),
            *(f"tests/test_{name}.py" for name in ("plan_changes", "shared_memory", "group_by_group")),
        ],
        (105, 60),
    ),
    # the bits of accumulation, Lookahead and EMA, over all combinations of dtypes
    "passes around a step": (["-k", "the_bits", "tests/test_wrappers.py"], (32, 32)),
}


@pytest.fixture(scope="module")
def started(
    tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config
) -> dict[str, tuple[subprocess.Popen[bytes], Path]]:
    """All of them at once: each keeps one core busy."""
    found = {}
    for name, (arguments, _) in RUNS.items():
        output = tmp_path_factory.mktemp("interpreted") / "output"
        with output.open("wb") as file:
            everything = ["--all"] if pytestconfig.getoption("--all") else []
            command = [sys.executable, "-m", "pytest", "-q", *everything, *arguments]
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
    assert int(passed[1]) >= RUNS[name][1][0 if pytestconfig.getoption("--all") else 1]
    left_elsewhere(pytestconfig, text)


def test_elsewhere_it_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match=r"backend='triton' is not available: .*TRITON_INTERPRET=1"):
        danlu.Lion(some_params(), backend="triton")
