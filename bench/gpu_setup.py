"""What `bench/gpu.sh` does before torch is there: looks at the machine, makes the native modules, and starts
in the background what takes other cores. Then bench/gpu.py goes on in the same process.
"""

from __future__ import annotations

import glob
import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gpu_background
import prebuilt
from commands import Command
from gpu_run import Run, parsed

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "gpu"
PACKAGE = BUILD / "package"
BUILD_SECONDS = 240.0
COMPILERS = ("c++", "g++", "clang++")
# modules and programs that are not needed, and what is missing without them
OPTIONAL = {
    "triton": "nothing by Triton",
    "numpy": "no plot",
    "matplotlib": "no plot",
    "pytest": "no tests",
    "xdist": "the tests run in one process",
}
PROGRAMS = {"nvcc": "no probe, no shapes", "ncu": "no profiles by ncu", "compute-sanitizer": "no memcheck"}
NSIGHT = "/opt/nvidia/nsight-compute/*"  # a folder for each version
SMI = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
TORCH = """
import torch
if torch.cuda.is_available():
    print("%d.%d" % torch.cuda.get_device_capability())
"""


def main(arguments: Sequence[str] | None = None) -> None:
    options = parsed(__doc__, arguments)
    find_tools()
    if not has("torch"):
        fail(f"{sys.executable} has no module torch")
    capability = gpu_capability()
    if not capability:
        fail("there is no NVIDIA GPU: torch sees no CUDA device")
    os.environ["DANLU_CAPABILITY"] = capability
    reason = prebuilt.why_not(prebuilt.PREBUILT, capability)
    missing = reason and lacking()
    if missing:
        fail(f"{missing} ({reason})")

    run = Run(options.out / "gpu.json", options.started)
    make = modules(reason)
    if shutil.which("nvcc"):
        gpu_background.start("probe")
    run.perform("machine", lambda _: machine())
    run.perform("parameters", lambda _: parameters())
    run.perform("modules", lambda _: make())
    if "error" in run.stages["modules"]:
        fail(run.stages["modules"]["error"])
    for name in ("smoke-cuda", "smoke-triton", "warm", *(["tune"] if shutil.which("nvcc") else [])):
        gpu_background.start(name)

    import gpu

    more = ["--stages", options.stages, "--started", str(options.started), "--out", str(options.out)]
    sys.exit(gpu.main(["--resume", *more]))


def fail(message: str) -> None:
    sys.exit(f"bench/gpu.sh: {message}")


def find_tools() -> None:
    """What may be installed beside the interpreter, or where CUDA's own installer puts it."""
    cuda = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    of_cuda = [f"{cuda}/bin", f"{cuda}/compute-sanitizer", *sorted(glob.glob(NSIGHT), reverse=True)]
    places = [sysconfig.get_path("scripts"), os.environ.get("PATH", ""), *of_cuda]
    os.environ["PATH"] = os.pathsep.join(places)
    own = [str(PACKAGE), str(ROOT / "bench"), str(ROOT / "tests")]
    sys.path[:0] = own
    os.environ["PYTHONPATH"] = os.pathsep.join([*own, *filter(None, [os.environ.get("PYTHONPATH")])])


def has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def gpu_capability() -> str:
    """As "90"; empty if there is no GPU. Where the driver's tool shows one GPU, torch need not be asked."""
    shown = _lines(SMI) if shutil.which("nvidia-smi") else []
    if len(shown) != 1 or not shown[0].replace(".", "", 1).isdigit():
        shown = _lines([sys.executable, "-c", TORCH])
    return shown[0].replace(".", "") if shown else ""


def _lines(command: Sequence[str]) -> list[str]:
    run = subprocess.run(command, capture_output=True, text=True)
    return run.stdout.split() if run.returncode == 0 else []


def lacking() -> str | None:
    """What a build needs and is not there, with the package that has it."""
    version = "{}.{}".format(*sys.version_info)
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not has("pybind11"):
        return f"{sys.executable} has no module pybind11"
    if not header.exists():
        packages = f"python{version}-dev on Debian and Ubuntu, python{version}-devel on Fedora"
        return f"{header} is missing: install {packages}"
    if not any(map(shutil.which, COMPILERS)):
        return "there is no C++ compiler: install g++"
    for tool, package in (("nvcc", "CUDA's toolkit, 12.8 or newer"), ("cmake", "cmake")):
        if shutil.which(tool) is None:
            return f"{tool} is not installed: install {package}"
    return None


def machine() -> dict[str, Any]:
    """What is there, and what is therefore left out."""
    absent = {name: loss for name, loss in OPTIONAL.items() if not has(name)}
    absent |= {name: loss for name, loss in PROGRAMS.items() if shutil.which(name) is None}
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.exists():
        absent["Python.h"] = OPTIONAL["triton"]  # which compiles a module for each kernel
    for name, loss in absent.items():
        print(f"  {name} is not installed: {loss}")
    return {"python": sys.version, "cores": os.cpu_count(), "absent": absent}


def parameters() -> dict[str, Any]:
    """What bench/probe_params.cu says, and what it means."""
    if shutil.which("nvcc") is None:
        return {"outcome": "not asked: nvcc is not installed"}
    status, output = gpu_background.finish("probe")
    lines = [line for line in output.splitlines() if line.startswith("{")]
    answer = json.loads(lines[-1]) if lines else {}
    if status != 0 or "wrong" not in answer:
        return {"outcome": f"no answer, exit status {status}", "output": output[-2000:]}
    if answer["wrong_below"]:
        meaning = "reads are wrong below the limit, too: the probe is at fault"
    elif answer["wrong"]:
        meaning = "the address is not wrapped: reads there are WRONG"
    else:
        meaning = "the address is wrapped at 16 bits: reads there are right"
    print(f"  {meaning}")
    return {"outcome": meaning, **answer}


def modules(reason: str | None) -> Callable[[], dict[str, Any]]:
    """Takes the prebuilt modules, or begins to build; the result waits until they are in the package.

    reason: why the prebuilt ones do not serve, None if they do.
    """
    shutil.rmtree(PACKAGE, ignore_errors=True)  # the checkout's may have modules for another Python
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "python" / "danlu", PACKAGE / "danlu", ignore=ignored)
    shutil.copytree(ROOT / "triton_kernels", PACKAGE / "danlu" / "triton_kernels", ignore=ignored)
    if reason is None:
        for path in prebuilt.PREBUILT.glob("*.so"):
            shutil.copy(path, PACKAGE / "danlu")
        return lambda: {"prebuilt": True}
    print(f"  {reason}; building for compute capability {os.environ['DANLU_CAPABILITY']}")
    building = Command(["bash", "-c", build_script()], BUILD_SECONDS)
    return lambda: built(building, reason)


def build_script() -> str:
    import pybind11

    configure = [
        *("cmake", "-S", ROOT, "-B", BUILD),
        *(["-G", "Ninja"] if shutil.which("ninja") else []),
        "-DDANLU_CUDA=1",
        f"-DDANLU_CUDA_ARCHS={os.environ['DANLU_CAPABILITY']}-real",
        f"-DCMAKE_CUDA_COMPILER={shutil.which('nvcc')}",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={PACKAGE / 'danlu'}",
    ]
    build = ["cmake", "--build", BUILD, "--parallel", os.cpu_count() or 1]
    return " && ".join(shlex.join(map(str, command)) for command in (configure, build))


def built(building: Command, reason: str) -> dict[str, Any]:
    status, output = building.finish()
    if status != 0:
        said = f"no end after {BUILD_SECONDS:.0f} s" if status is None else f"exit status {status}"
        raise RuntimeError(f"the build failed, {said}: {output[-3000:]}")
    return {"prebuilt": False, "why": reason}


if __name__ == "__main__":
    main()
