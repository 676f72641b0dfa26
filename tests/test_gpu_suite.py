"""The tests for GPUs, as far as the emulator carries them: on a GPU they fail for its reasons only."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from emulated import AVAILABLE

TESTS = Path(__file__).parent


def pytest_on_gpu_tests(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", f"--confcutdir={TESTS / 'gpu'}", str(TESTS / "gpu")]
    environment = {**os.environ, "PYTHONPATH": str(TESTS), **env}
    return subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True)


@pytest.mark.full
@pytest.mark.skipif(not AVAILABLE, reason="the emulator switches stacks in x86-64 assembly")
def test_in_the_emulator() -> None:
    run = pytest_on_gpu_tests(DANLU_GPU_TESTS="emulated")
    assert run.returncode == 0, run.stdout[-3000:]
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed
    assert int(passed[1]) > 400
    reasons = set(re.findall(r"SKIPPED .*?: (.*)", run.stdout))
    assert reasons == {"needs a GPU"}


def test_without_a_gpu_they_fail() -> None:
    run = pytest_on_gpu_tests(CUDA_VISIBLE_DEVICES="")
    assert run.returncode == 3
    assert re.search("backend cuda: (no NVIDIA driver|no CUDA device)", run.stdout + run.stderr)
