"""What `bench/gpu.sh` does before it measures: modules built ahead or now, tools, the probe."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gpu
import step_time
from harness import ROOT


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
