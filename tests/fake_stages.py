"""The stages of `bench/gpu.py` over a fake GPU: small workloads, and answers in place of programs."""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import commands
import cuda_harness
import gpu_background
import gpu_ncu
import gpu_stages
import lazy_rows
from danlu.backends import BACKENDS
from emulated import emulated
from fake_gpu import FakeGpu
from workloads import Workload

TINY = Workload("tiny", "a few tensors", [(40, 30), (30,), (7,)])
TINIER = Workload("tinier", "two tensors", [(64,), (3,)])
SHAPE = dict(rule="lion", formats="f32/f32/f32", threads=256, elements=8, min_blocks=4, chunk=16384)
RIGHT = {"check": "lion float32", "right": True, "differences": []}
WRONG = {"check": "lion float32", "right": False, "differences": ["parameter 0: 3 of 7 differ: ..."]}
NCU = """==PROF== Connected to process 1
"ID","Process ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value","Rule Name"
"0","1","void apply_kernel<Adam>","GPU Speed Of Light Throughput","DRAM Throughput","%","91.2",""
"0","1","void apply_kernel<Adam>","Occupancy","Registers Per Thread","register/thread","64",""
"0","1","void apply_kernel<Adam>","Occupancy","","","","advice"
"1","1","void apply_kernel<Lion>","GPU Speed Of Light Throughput","DRAM Throughput","%","89.9",""
"""


@pytest.fixture(name="fake")
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpu]:
    monkeypatch.setenv(commands.DEADLINE, "inf")  # a run sets it
    made = FakeGpu()
    made.install(monkeypatch)
    yield made
    gc.unfreeze()


@pytest.fixture(name="small")
def small_stages(fake: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    """Small workloads for all stages, and no commands."""
    shrink(monkeypatch)
    answer(monkeypatch)
    return fake


@pytest.fixture(name="kernels")
def emulated_kernels(fake: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    """The CUDA kernels in the emulator instead of the CPU's."""
    monkeypatch.setitem(BACKENDS, "cuda", emulated())
    monkeypatch.setattr(cuda_harness, "BACKEND", "cuda")
    emulated().native.reset()
    return fake


def shrink(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(gpu_stages, "MODELS", [TINY, TINIER])
    patch.setattr(gpu_stages, "GPT2", TINY)
    patch.setattr(gpu_stages, "MANY_SMALL", TINIER)
    patch.setattr(gpu_stages, "LLAMA_8B", TINIER)
    patch.setattr(gpu_stages, "CEILING_ELEMENTS", 1000)
    patch.setattr(lazy_rows, "SHAPE", (90, 16))
    patch.setattr(lazy_rows, "LISTED", 10)
    patch.setattr(torch, "compile", lambda step: step)  # the compiler takes its time


def answer(patch: pytest.MonkeyPatch, cuda: Any = (0, RIGHT), triton: Any = (0, RIGHT)) -> list[str]:
    """Lets programs answer at once; gives their names as they are asked.

    cuda, triton: exit status and checks of their smoke tests.
    """
    asked: list[str] = []

    def finish(name: str, seconds: float | None = None) -> tuple[int | None, str]:
        asked.append(name)
        status, *checks = {"smoke-cuda": cuda, "smoke-triton": triton}.get(name, (0,))
        return status, "".join(json.dumps(check) + "\n" for check in checks)

    def limited(
        command: Sequence[Any], seconds: float, capture: bool = True, **env: str
    ) -> tuple[int | None, str]:
        asked.append(Path(command[0]).name)
        return program(command)

    patch.setattr(gpu_background, "finish", finish)
    patch.setattr(gpu_stages, "limited", limited)
    patch.setattr(gpu_ncu, "limited", limited)
    install_tools(patch)
    return asked


def install_tools(patch: pytest.MonkeyPatch) -> None:
    real = shutil.which
    tools = {name: f"/bin/{name}" for name in ("ncu", "compute-sanitizer")}
    patch.setattr(shutil, "which", lambda name, **options: tools.get(name) or real(name, **options))


def program(command: Sequence[Any]) -> tuple[int | None, str]:
    """What the programs of the stages may answer."""
    name = Path(command[0]).name
    if name == "tune":
        rows = [{**SHAPE, "workload": "one-tensor", "ms": 2.0, "gbps": 2700.0, "same_bits": True}]
        rows.append({**rows[0], "chunk": 4096, "ms": 1.9, "gbps": 2800.0})
        return 0, "".join(json.dumps(row) + "\n" for row in rows)
    if name == "ncu":
        return 0, NCU
    if "gpu_tests.py" in str(command[1:2]):
        failed = {"test": "tests/gpu/test_x.py::test_a", "outcome": "failed", "message": "assert 1 == 2"}
        passed = {"test": "tests/gpu/test_x.py::test_b", "outcome": "passed", "message": ""}
        lines = [json.dumps({**outcome, "seconds": 1.5}) + "\n" for outcome in (failed, passed)]
        Path(command[2]).write_text("".join(lines) + '{"test": "tests/gpu/te')  # the process was ended
        return 1, ""
    return 0, ""
