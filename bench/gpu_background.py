"""Commands that `bench/gpu.sh` starts early and whose outcome it asks for later."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from commands import Command

ROOT = Path(__file__).resolve().parent.parent
BENCH, BUILD = ROOT / "bench", ROOT / "build" / "gpu"
SMOKE_SECONDS = 120.0  # Triton compiles some twenty kernels
COMPILE = 'nvcc -std=c++17 -O3 -fmad=false "-arch=sm_$DANLU_CAPABILITY" -I csrc'

_running: dict[str, Command] = {}


def command(name: str) -> tuple[Sequence[str | Path], float]:
    """One of those known here, and the seconds that it may take."""
    probe, tune = f"{BUILD}/probe_params", f"{BUILD}/tune"
    commands: dict[str, tuple[Sequence[str | Path], float]] = {
        "probe": (["bash", "-c", f"{COMPILE} bench/probe_params.cu -o '{probe}' && '{probe}'"], 60.0),
        "tune": (["bash", "-c", f"{COMPILE} bench/tune.cu -o '{tune}'"], 240.0),
        "smoke-cuda": ([sys.executable, BENCH / "gpu_smoke.py", "cuda"], SMOKE_SECONDS),
        "smoke-triton": ([sys.executable, BENCH / "gpu_smoke.py", "triton"], SMOKE_SECONDS),
        "warm": ([sys.executable, BENCH / "gpu_warm.py"], 90.0),
    }
    return commands[name]


def start(name: str) -> None:
    BUILD.mkdir(parents=True, exist_ok=True)
    arguments, seconds = command(name)
    _running[name] = Command(arguments, seconds, DANLU_CAPABILITY=capability())


def finish(name: str, seconds: float | None = None) -> tuple[int | None, str]:
    """Exit status, None if the time was up, and output; starts it if it was not."""
    if name not in _running:
        start(name)
    return _running.pop(name).finish(seconds)


def capability() -> str:
    """Of the GPU, as "90"."""
    if "DANLU_CAPABILITY" not in os.environ:
        import torch

        os.environ["DANLU_CAPABILITY"] = "{}{}".format(*torch.cuda.get_device_capability())
    return os.environ["DANLU_CAPABILITY"]
