"""CONTRIBUTING's steps for a new optimizer, performed on a copy of the project."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from emulated import AVAILABLE

ROOT = Path(__file__).resolve().parent.parent


def steps() -> dict[str, str]:
    """The code of each file that the section names, by path."""
    section = (ROOT / "CONTRIBUTING.md").read_text().split("## Adding an optimizer")[1]
    blocks = re.findall(r"in `([\w/.]+)`[^`]*(?:`[^`]+`[^`]*)*?\n```\w+\n(.*?)```", section, flags=re.DOTALL)
    return dict(blocks)


def insert_before(path: Path, marker: str, line: str) -> None:
    text = path.read_text()
    assert marker in text
    path.write_text(text.replace(marker, line + marker, 1))


@pytest.mark.full
def test_an_optimizer_added_by_the_book(tmp_path: Path) -> None:
    code = steps()
    assert len(code) == 7
    copy = tmp_path / "danlu"
    for folder in ("csrc", "python", "tests", "triton_kernels"):
        ignore = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info")
        shutil.copytree(ROOT / folder, copy / folder, ignore=ignore)
    shutil.copy(ROOT / "CMakeLists.txt", copy)
    (copy / "python/danlu/triton_kernels").symlink_to(copy / "triton_kernels")
    for name in (
        "csrc/rules/heavy_ball.h",
        "python/danlu/optimizers/heavy_ball.py",
        "triton_kernels/rules/heavy_ball.py",
    ):
        (copy / name).write_text(code[name])
    rules = copy / "triton_kernels/rules/__init__.py"
    imported, listed = code["triton_kernels/rules/__init__.py"].splitlines(keepends=True)
    insert_before(rules, "from .lion", imported)
    insert_before(rules, '    "lion":', listed)
    list_of_rules = copy / "csrc/rules.h"
    # the others would take minutes
    others_gone = re.sub(r"^(REDUCING_)?RULE.*\n", "", list_of_rules.read_text(), flags=re.MULTILINE)
    list_of_rules.write_text(others_gone + code["csrc/rules.h"])
    insert_before(copy / "python/danlu/__init__.py", "\n__version__", code["python/danlu/__init__.py"])
    insert_before(copy / "tests/cases.py", "]\n\n# rules that sum", code["tests/cases.py"])

    tools = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
    env = {**os.environ, "PATH": tools, "PYTHONPATH": str(copy / "python")}
    pybind11 = subprocess.check_output([sys.executable, "-m", "pybind11", "--cmakedir"], text=True).strip()
    configure = [
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11}",
        f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={copy / 'python/danlu'}",
        "-DDANLU_CUDA=0",  # its kernels run in the emulator, which the tests build
    ]
    build = copy / "build"
    subprocess.run(["cmake", "-S", copy, "-B", build, "-G", "Ninja", *configure], check=True, env=env)
    subprocess.run(["cmake", "--build", build], check=True, env=env)
    layered = "tests/test_layer_adaptation.py"
    files = ["tests/test_same_bits.py", layered, *(["tests/test_cuda_bits.py"] if AVAILABLE else [])]
    selected = ["-k", "heavy-ball and (f32-f32-f32 or bf16-bf16-bf16 or ordinary or ratio)"]
    assert passed(copy, env, *selected, *files) >= (18 if AVAILABLE else 11)
    interpret = {**env, "TRITON_INTERPRET": "1"}
    assert passed(copy, interpret, *selected, layered, "tests/interpreted/test_triton_bits.py") >= 6


def passed(copy: Path, env: dict[str, str], *arguments: str) -> int:
    """How many tests pass in the copy; all must."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--all",
        "-c",
        os.devnull,
        "--rootdir",
        str(copy),
        *arguments,
    ]
    run = subprocess.run(command, cwd=copy, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:]
    found = re.search(r"(\d+) passed", run.stdout)
    assert found
    return int(found[1])
