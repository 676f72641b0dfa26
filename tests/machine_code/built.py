"""The built `danlu._cuda`, which has to be that of these sources."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from functools import cache
from pathlib import Path

import pytest

from . import code

ROOT = Path(__file__).resolve().parent.parent.parent


@cache
def library() -> Path:
    """Its file. Tests are skipped where there is no CUDA compiler and fail where sources are newer."""
    found = code.library()
    if found is None:
        assert not os.environ.get("CI"), "CI needs nvcc"
        pytest.skip("danlu._cuda is not built: there is no nvcc")
    assert _is_current(), "csrc is newer than danlu._cuda: build it with `make test`"
    return found


def _is_current() -> bool:
    build = ROOT / "build" / f"native-{sys.implementation.cache_tag}"
    ninja = shutil.which("ninja", path=os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]]))
    if ninja is None or not (build / "build.ninja").exists():
        return True  # built elsewhere or with make
    run = subprocess.run([ninja, "-C", build, "-n", "_cuda"], capture_output=True, text=True, check=True)
    return "Building" not in run.stdout  # what pip has linked into a folder of its own it would link again
