"""The CUDA backend over CPU tensors: its module built with the emulator in place of the CUDA runtime."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from functools import cache
from pathlib import Path
from types import ModuleType

import filelock
import pybind11
import torch

from danlu.backends.cuda import Cuda

ROOT = Path(__file__).resolve().parent.parent
AVAILABLE = sys.platform == "linux" and platform.machine() == "x86_64"
STREAM = 0xDA17  # what torch's current stream is said to be


class Emulated(Cuda):
    """Takes CPU tensors where `danlu.backends.cuda.CUDA` takes CUDA tensors."""

    def __init__(self, native: ModuleType) -> None:
        super().__init__(native, device_type="cpu")

    def stream(self, device: torch.device) -> int:
        return STREAM


@cache
def emulated(*, sanitize: bool = False) -> Emulated:
    return Emulated(load(built(sanitize)))


def built(sanitize: bool = False) -> Path:
    """Builds what is out of date and gives the folder of the module."""
    sanitized = f"-DDANLU_SANITIZE={'ON' if sanitize else 'OFF'}"
    return cmake("sanitized" if sanitize else "emulator", [sanitized], ["_cuda_emulator"])


def cmake(name: str, settings: list[str], targets: list[str]) -> Path:
    """Builds what is out of date in a folder of that name, and gives that of the modules."""
    tools = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
    build = ROOT / "build" / f"{name}-{sys.implementation.cache_tag}"
    generator = ["-G", "Ninja"] if shutil.which("ninja", path=tools) else []
    options = [
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={build / 'module'}",
        "-DDANLU_CUDA=0",
        *settings,
    ]
    environment = {**os.environ, "PATH": tools}
    build.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(build / "lock"):  # tests may run in several processes
        for command in (
            ["cmake", "-S", ROOT, "-B", build, *generator, *options],
            ["cmake", "--build", build, "--parallel", "--target", *targets],
        ):
            run = subprocess.run(command, env=environment, capture_output=True, text=True)
            assert run.returncode == 0, run.stdout + run.stderr
    return build / "module"


def load(folder: Path, name: str = "_cuda_emulator") -> ModuleType:
    (path,) = (p for p in folder.glob(f"{name}.*.so"))
    # pybind11 gives what it has loaded under a name before: each folder is a package of its own
    full_name = f"{folder.parent.name.partition('-')[0]}.{name}"
    loader = importlib.machinery.ExtensionFileLoader(full_name, str(path))
    spec = importlib.util.spec_from_loader(full_name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module
