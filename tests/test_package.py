"""The wheel: complete, importable away from the checkout, and honest where the native module is missing."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.full  # builds everything once more


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel's contents."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", folder, ROOT]
    # a folder of its own for setuptools, which would take along what lies in an old one
    apart = f"--config-settings=--global-option=build --build-base={folder / 'build'}"
    subprocess.run([*command, apart], check=True, capture_output=True)
    (wheel,) = folder.glob("danlu-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def python(site: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(site), **env}
    return subprocess.run(
        [sys.executable, *arguments], cwd=site, env=environment, capture_output=True, text=True
    )


def test_the_wheel_has_every_module(installed: Path) -> None:
    sources = {
        p.relative_to(ROOT / "python") for p in (ROOT / "python/danlu").rglob("*.py*") if p.suffix != ".pyc"
    }
    kernels = ROOT / "triton_kernels"
    triton = {Path("danlu/triton_kernels") / p.relative_to(kernels) for p in kernels.rglob("*.py")}
    files = {p.relative_to(installed) for p in installed.rglob("*")}
    assert sources | triton | {Path("danlu/py.typed")} <= files
    modules = ["_cpu."] if shutil.which("nvcc") is None else ["_cpu.", "_cuda."]
    assert all(any(p.name.startswith(m) and p.suffix == ".so" for p in files) for m in modules)
    assert not {p.parts[0] for p in files} & {"tests", "bench"}


def test_info_from_the_wheel(installed: Path) -> None:
    run = python(installed, "-m", "danlu.info", "--json")
    assert run.returncode == 0, run.stderr
    facts = json.loads(run.stdout)
    assert facts["backends"]["cpu"] == "available"
    if not torch.cuda.is_available():
        assert re.search("no NVIDIA driver|no CUDA device|was not built", facts["backends"]["cuda"])
    assert {check["optimizer"] for check in facts["self_check"]} == {
        "Lion",
        "Tiger",
        "AdamW",
        "Adam",
        "AdaX",
        "AdaXW",
        "Adafactor",
        "LAMB",
        "Amos",
    }
    assert all(check["ok"] for check in facts["self_check"])
    text = python(installed, "-m", "danlu.info")
    assert "one step of Lion on cpu: same bits as the reference" in text.stdout


def test_import_is_silent(installed: Path) -> None:
    run = python(installed, "-W", "error", "-c", "import danlu")
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


def test_without_the_native_module(installed: Path, tmp_path: Path) -> None:
    """Another platform: the reference serves, and every place that knows says why."""
    for source in (installed / "danlu").rglob("*.py"):
        target = tmp_path / source.relative_to(installed)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(source.read_text())
    for name in ("_cpu", "_cuda"):
        (tmp_path / f"danlu/{name}.py").write_text("raise ImportError('undefined symbol')")
    run = python(tmp_path, "-m", "danlu.info", "--json")
    assert run.returncode == 0, run.stderr
    facts = json.loads(run.stdout)
    assert facts["backends"]["cpu"].startswith("danlu._cpu cannot be imported")
    assert facts["backends"]["cuda"].startswith("danlu._cuda cannot be imported")
    assert facts["self_check"] == []
    code = (
        "import torch, danlu\n"
        "p = torch.nn.Parameter(torch.ones(2)); p.grad = torch.ones(2)\n"
        "o = danlu.Lion([p], lr=0.5); o.step(); print(p.tolist(), o.backend_report()[0].reason)"
    )
    assert python(tmp_path, "-c", code).stdout.startswith("[0.5, 0.5] not cpu: danlu._cpu cannot be imported")
