"""What `bench/gpu.sh` does before it measures: modules built ahead or now, tools, the probe."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import gpu
import gpu_background
import gpu_run
import gpu_setup
import prebuilt
import step_time
from commands import DEADLINE, Command, limited
from harness import ROOT
from machine_code.listing import tool

SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
OWN = [ROOT / "python" / "danlu" / f"{name}{SUFFIX}" for name in prebuilt.MODULES]


@pytest.fixture
def built(tmp_path: Path) -> dict[str, Any]:
    """What stands beside modules that serve, in tmp_path; the modules are empty."""
    for name in prebuilt.MODULES:
        (tmp_path / f"{name}{SUFFIX}").write_bytes(b"")
    return {"suffix": SUFFIX, "architectures": "80-real,90-real", "sources": prebuilt.digest()}


def test_prebuilt_modules_that_serve(built: dict[str, Any], tmp_path: Path) -> None:
    if not all(path.exists() for path in OWN):  # both are built where nvcc is
        compiler()
    for path in OWN:
        shutil.copy(path, tmp_path)
    (tmp_path / "built.json").write_text(json.dumps(built))
    assert prebuilt.why_not(tmp_path, "90") is None


@pytest.mark.parametrize(
    ("changed", "capability", "reason"),
    [
        (dict(suffix=".cpython-27.so"), "90", r"are for \.cpython-27\.so, this interpreter loads \.c"),
        (dict(sources="older"), "90", "are from other sources"),
        ({}, "100", "are for capability 80-real,90-real, the GPU has 100"),
        ({}, "90", "cannot be loaded: ImportError: .*file too short"),
        (None, "90", "there are no prebuilt modules in"),
    ],
)
def test_prebuilt_modules_that_cannot_serve(
    changed: dict[str, Any] | None, capability: str, reason: str, built: dict[str, Any], tmp_path: Path
) -> None:
    if changed is not None:
        (tmp_path / "built.json").write_text(json.dumps({**built, **changed}))
    found = prebuilt.why_not(tmp_path, capability)
    assert found is not None
    assert re.search(reason, found), found


def test_code_runs_on_its_own_major_version() -> None:
    serves = [
        prebuilt.runs_on("80-real;90-real", capability) for capability in ("80", "86", "90", "100", "75")
    ]
    assert serves == [True, True, True, False, False]
    assert not prebuilt.runs_on("89-real", "86")


def test_the_glibc_that_modules_need() -> None:
    """What readelf says, too."""
    if shutil.which("readelf") is None:
        assert not os.environ.get("CI"), "CI needs readelf"
        pytest.skip("readelf is not installed")
    paths = [path for path in OWN if path.exists()]
    listed = subprocess.check_output(["readelf", "--version-info", "--wide", *paths], text=True)
    for name in ("GLIBC", "GLIBCXX"):
        versions = re.findall(rf"Name: {name}_([\d.]+)", listed)
        assert prebuilt.newest(name, paths) == max(versions, key=prebuilt.numbers)


def test_the_interpreter_to_build_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first of its version that says it has Python.h."""
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path / "pyenv"))
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    own = "{}.{}".format(*sys.version_info)
    assert prebuilt.interpreter("3.99") == (sys.executable, own)
    for folder, says in ((tmp_path, ""), (tmp_path / "pyenv/versions/3.99.1/bin", "3.99")):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "python3.99").write_text(f"#!/bin/sh\necho {says}\n")
        (folder / "python3.99").chmod(0o755)
    assert prebuilt.interpreter("3.99") == (str(tmp_path / "pyenv/versions/3.99.1/bin/python3.99"), "3.99")


def test_what_a_build_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is named with where it comes from."""
    tools = {"c++": "/c++", "nvcc": "/nvcc", "cmake": "/cmake"}
    include = {"include": str(tmp_path)}
    modules = {"pybind11"}
    monkeypatch.setattr(shutil, "which", tools.get)
    monkeypatch.setattr(sysconfig, "get_path", include.get)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name in modules else None)
    version = "{}.{}".format(*sys.version_info)
    said = [gpu_setup.lacking()]
    (tmp_path / "Python.h").touch()
    assert gpu_setup.lacking() is None
    for name in list(tools):
        path = tools.pop(name)
        said.append(gpu_setup.lacking())
        tools[name] = path
    modules.clear()
    said.append(gpu_setup.lacking())
    assert said == [
        f"{tmp_path}/Python.h is missing: install python{version}-dev on Debian and Ubuntu, "
        f"python{version}-devel on Fedora",
        "there is no C++ compiler: install g++",
        "nvcc is not installed: install CUDA's toolkit, 12.8 or newer",
        "cmake is not installed: install cmake",
        f"{sys.executable} has no module pybind11",
    ]


def test_what_may_be_absent_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else name)
    monkeypatch.setattr(shutil, "which", lambda name: None if name == "ncu" else name)
    assert gpu_setup.machine()["absent"] == {"matplotlib": "no plot", "ncu": "no profiles by ncu"}
    assert "  matplotlib is not installed: no plot\n" in capsys.readouterr().out


def test_measuring_imports_nothing_that_may_be_absent() -> None:
    """Not matplotlib, rich or numpy, at the top of any file that a measurement loads; nor torch before it."""

    def imported(name: str, seen: set[str]) -> Iterator[str]:
        path = ROOT / "bench" / f"{name}.py"
        if name in seen or not path.exists():
            yield name
            return
        seen.add(name)
        for node in ast.parse(path.read_text()).body:
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for one in filter(None, names):
                yield from imported(one.split(".")[0], seen)

    for script in ("gpu", "gpu_smoke", "gpu_warm", "gpu_ncu", "memcheck"):
        assert not set(imported(script, set())) & {"matplotlib", "rich", "numpy", "pytest"}, script
    assert not set(imported("gpu_setup", set())) & {"torch", "danlu", "pybind11"}


def test_the_capability_comes_from_the_driver_where_it_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    smi = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(gpu_setup, "TORCH", "print('8.9')")
    for says, capability in (("9.0", "90"), ("10.3", "103"), ("9.0\\n8.0", "89"), ("no devices", "89")):
        smi.write_text(f"#!/bin/sh\nprintf '{says}\\n'\n")
        smi.chmod(0o755)
        assert gpu_setup.gpu_capability() == capability
    monkeypatch.setattr(gpu_setup, "TORCH", "import sys; sys.exit(1)")
    assert gpu_setup.gpu_capability() == ""


@pytest.mark.parametrize(
    ("status", "answer", "outcome"),
    [
        (0, dict(wrong=0, wrong_below=0), "the address is wrapped at 16 bits: reads there are right"),
        (0, dict(wrong=9, wrong_below=0), "the address is not wrapped: reads there are WRONG"),
        (0, dict(wrong=9, wrong_below=9), "reads are wrong below the limit, too: the probe is at fault"),
        (1, dict(error="an illegal memory access"), "no answer, exit status 1"),
        (None, None, "no answer, exit status None"),
    ],
)
def test_what_the_probe_means(
    status: int | None, answer: dict[str, Any] | None, outcome: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = "" if answer is None else f"nvcc warning\n{json.dumps(answer)}\n"
    monkeypatch.setattr(gpu_background, "finish", lambda _: (status, output))
    monkeypatch.setattr(shutil, "which", lambda name: name)
    assert gpu_setup.parameters()["outcome"] == outcome
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert gpu_setup.parameters()["outcome"] == "not asked: nvcc is not installed"


def test_the_modules_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prebuilt ones are copied; others are built for this card, and a failure says what failed."""
    monkeypatch.setattr(gpu_setup, "PACKAGE", tmp_path / "package")
    monkeypatch.setattr(prebuilt, "PREBUILT", tmp_path)
    monkeypatch.setenv("DANLU_CAPABILITY", "86")
    (tmp_path / "_cpu.so").touch()
    assert gpu_setup.modules(None)() == {"prebuilt": True}
    package = tmp_path / "package" / "danlu"
    assert sorted(path.name for path in package.glob("*.so")) == ["_cpu.so"]
    assert (package / "triton_kernels" / "engine.py").exists()
    script = gpu_setup.build_script()
    assert "-DDANLU_CUDA_ARCHS=86-real" in script
    assert f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={package}" in script
    monkeypatch.setattr(gpu_setup, "build_script", lambda: "echo no such header; exit 2")
    make = gpu_setup.modules("they are not there")
    assert not list(package.glob("*.so"))
    with pytest.raises(RuntimeError, match="the build failed, exit status 2: no such header"):
        make()


def test_commands_know_when_everything_has_to_be_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that nobody waits for."""
    monkeypatch.setenv(DEADLINE, str(time.time() + 0.5))
    start = time.time()
    assert limited(["sleep", "60"], 50.0) == (None, "")
    assert time.time() - start < 20
    forgotten = Command(["sleep", "60"], 50.0)
    forgotten._process.wait(20)
    assert time.time() - start < 20
    assert forgotten.finish(0.0)[0] == -9


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


def test_the_script_ends_itself(tmp_path: Path) -> None:
    """Also where Python hangs; by default when the stages' own limit has passed."""
    python, script = tmp_path / "python", ROOT / "bench" / "gpu.sh"
    python.write_text('#!/bin/sh\necho "$@"\nexec sleep 60\n')
    python.chmod(0o755)
    start = time.time()
    run = subprocess.run(
        ["bash", script, "--stages", "ncu"],
        env={**os.environ, "PYTHON": str(python), "DANLU_SECONDS": "1"},
        capture_output=True,
        text=True,
    )
    assert time.time() - start < 20
    assert run.returncode in (137, -9)
    assert re.fullmatch(r"bench/gpu_setup.py --started \d+ --stages ncu\n", run.stdout)
    assert f"DANLU_SECONDS:-{gpu_run.LIMIT:.0f}}}" in script.read_text()


def test_the_probe_compiles(tmp_path: Path) -> None:
    """To the reads that it asks about: at 0x8000 and above as a signed offset, without a correction."""
    nvcc = compiler()
    program = tmp_path / "probe"
    command = [nvcc, "-std=c++17", "-O3", "-arch=sm_90", ROOT / "bench" / "probe_params.cu", "-o", program]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    code = subprocess.check_output([tool("cuobjdump"), "--dump-sass", program], text=True)
    reads = re.findall(r"LDC\S* R\d+, c\[0x0\]\[R\d+\+(-?0x\w+)\]", code)
    assert {"-0x8000", "-0x7ff4"} <= set(reads)
    assert "0x7e00" in reads
    if not torch.cuda.is_available():
        run = subprocess.run([program], capture_output=True, text=True)
        assert run.returncode == 1
        assert "error" in json.loads(run.stdout)


def compiler() -> str:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        assert not os.environ.get("CI"), "CI needs nvcc"
        pytest.skip("nvcc is not installed")
    return nvcc


@pytest.mark.full
def test_tune_compiles(tmp_path: Path) -> None:
    """And spills nothing: a shape that does would only be slow."""
    nvcc = compiler()
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
