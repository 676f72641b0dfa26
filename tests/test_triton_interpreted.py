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


REDUCING = "tests/interpreted/test_triton_reducing.py"
BITS = sorted(str(path.relative_to(TESTS.parent)) for path in TESTS.glob("interpreted/test_*.py"))
BITS.remove(REDUCING)
RUNS = {
    "bits": Run(BITS, "", "", (164, 100)),
    "rules that reduce": Run([REDUCING], "", "", (74, 30)),
    # the tests with the fixture `backend`; of rules that reduce, which take seconds each, one, in fp32
    "what every backend must do": Run(
        of("gradient_scale", "torch_contract", "checkpoints"),
        "triton and not (adax or adafactor or amos or tiger-matrix or tiger-rows)",
        "triton and not (adax or adafactor or amos or tiger or layer or adam- or lamb and (bf16 or fp16))",
        (195, 100),
    ),
    # of a rule with one state, and of one that accumulates; without --all some: it is the plan that sees them
    "changes between steps": Run(
        of("plan_changes", "shared_memory", "group_by_group"),
        "triton and (lion or tiger-accumulate)",
        "triton and (lion or tiger-accumulate) and not (layer or attributes)"
        " and (gradient_late or lion and not parts or not lion and not a_change_is_seen)",
        (105, 45),
    ),
    # formats that only tests have
    "formats": Run(of("formats"), "triton", "triton", (16, 16)),
    # the bits of accumulation, Lookahead and EMA over all combinations of dtypes, without --all together
    "passes around a step": Run(
        of("wrappers"), "the_bits", "the_bits and (three or f32-f32-f32 or bf16-bf16-bf16)", (32, 14)
    ),
}


class Started(NamedTuple):
    process: subprocess.Popen[bytes]
    output: Path
    all_tests: bool


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> dict[str, Started]:
    """With --all each by itself, all at once; without it one process, which takes seconds to start."""
    if pytestconfig.getoption("--all"):
        return {
            name: start(tmp_path_factory, ["--all", "-k", wanted.all_tests, *wanted.paths])
            for name, wanted in RUNS.items()
        }
    chosen = " or ".join(map(those_of, RUNS.values()))
    paths = [path for wanted in RUNS.values() for path in wanted.paths]
    return dict.fromkeys(RUNS, start(tmp_path_factory, ["-k", chosen, *paths]))


def those_of(wanted: Run) -> str:
    """For pytest's -k, which knows the names of files, too."""
    files = " or ".join(path.rpartition("/")[2] for path in wanted.paths)
    return f"(({files}) and ({wanted.tests}))" if wanted.tests else f"({files})"


def start(tmp_path_factory: pytest.TempPathFactory, arguments: list[str]) -> Started:
    output = tmp_path_factory.mktemp("interpreted") / "output"
    with output.open("wb") as file:
        command = [sys.executable, "-m", "pytest", "-v", *arguments]
        env = {**os.environ, "TRITON_INTERPRET": "1"}
        run = subprocess.Popen(command, cwd=TESTS.parent, env=env, stdout=file, stderr=subprocess.STDOUT)
    return Started(run, output, "--all" in arguments)


@pytest.mark.parametrize("name", RUNS)
def test_interpreted(name: str, started: dict[str, Started], pytestconfig: pytest.Config) -> None:
    run = started[name]
    status, text = run.process.wait(), run.output.read_text()
    assert status == 0, text[-3000:]
    assert "skipped" not in text.splitlines()[-1]
    passed = re.findall(r"^(\S+?)::.* PASSED", text, re.MULTILINE)
    assert sum(path in RUNS[name].paths for path in passed) >= RUNS[name].least[0 if run.all_tests else 1]
    if run.all_tests or name == next(iter(RUNS)):
        left_elsewhere(pytestconfig, text)


def test_elsewhere_it_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match=r"backend='triton' is not available: .*TRITON_INTERPRET=1"):
        danlu.Lion(some_params(), backend="triton")
