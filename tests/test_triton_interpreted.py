"""Runs the tests of the Triton backend in a process of their own: kernels are interpreted there or never."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import danlu
from training import some_params

TESTS = Path(__file__).parent


def interpreted(*arguments: str) -> int:
    """The number of tests that passed."""
    command = [sys.executable, "-m", "pytest", "-q", *arguments]
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run(command, cwd=TESTS.parent, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:]
    assert "skipped" not in run.stdout.splitlines()[-1]
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed
    return int(passed[1])


def test_bits() -> None:
    """Everything in tests/interpreted but what the next test has."""
    assert interpreted("tests/interpreted", "--ignore=tests/interpreted/test_triton_reducing.py") >= 184


def test_rules_that_reduce() -> None:
    assert interpreted("tests/interpreted/test_triton_reducing.py") >= 82


def test_what_every_backend_must_do() -> None:
    """The tests with the fixture `backend`."""
    files = ["test_gradient_scale", "test_torch_contract", "test_checkpoints"]
    assert interpreted("-k", "triton and not adax", *(f"tests/{name}.py" for name in files)) >= 195


def test_changes_between_steps() -> None:
    """Of a rule with one state, and of one that accumulates."""
    some = "triton and (lion or tiger-accumulate)"
    assert interpreted("-k", some, "tests/test_plan_changes.py") >= 100


def test_passes_around_a_step() -> None:
    """The bits of accumulation, Lookahead and EMA, over all combinations of dtypes."""
    assert interpreted("-k", "the_bits and lion", "tests/test_wrappers.py") >= 32


def test_elsewhere_it_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match=r"backend='triton' is not available: .*TRITON_INTERPRET=1"):
        danlu.Lion(some_params(), backend="triton")
