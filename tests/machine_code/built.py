"""The built `danlu._cuda`, which has to be that of these sources."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from cases import BF16, F16, F32, STORAGES, Storage
from danlu.backends.cuda import CUDA
from listed_rules import ELEMENT_WISE

from . import code

ROOT = Path(__file__).resolve().parent.parent.parent
ARCHITECTURE = 90  # whose machine code `make test` reads
COMPILED = [storage for storage in STORAGES if storage.moment != F16]


@cache
def library() -> Path:
    """Its file. Tests are skipped where there is no CUDA compiler and fail where sources are newer."""
    found = code.library()
    if found is None:
        assert not os.environ.get("CI"), "CI needs nvcc"
        pytest.skip("danlu._cuda is not built: there is no nvcc")
    assert _is_current(), "csrc is newer than danlu._cuda: build it with `make test`"
    names = architectures()
    if not {f"{ARCHITECTURE}", f"{ARCHITECTURE}-real"} & {*names} or all(n.endswith("-real") for n in names):
        assert not os.environ.get("CI"), "CI builds all architectures"
        pytest.skip(f"danlu._cuda is built for {names}: tests read PTX, and machine code of {ARCHITECTURE}")
    return found


def architectures() -> list[str]:
    """What it is built for, as DANLU_CUDA_ARCHS has it."""
    return _module("architectures").split(",")


def oldest() -> int:
    """The oldest of these, whose PTX it has."""
    return min(int(name.partition("-")[0].rstrip("af")) for name in architectures())


def combinations() -> str:
    """The rules that have all combinations of storage formats, or "all"."""
    return _module("combinations")


def every(rules: Iterable[str], storages_of_all: Iterable[Storage]) -> list[Any]:
    """Of a test over rules and storage formats; what `make test` does not build is left to --all."""
    return [
        pytest.param(
            rule,
            storage,
            id=f"{rule}-{storage.id}",
            marks=() if storage in storages(rule) else pytest.mark.full,
        )
        for rule, storage in itertools.product(rules, storages_of_all)
    ]


def storages(rule: str) -> list[Storage]:
    """What it should have of a rule, as csrc/cuda/combinations.cuh lists them; all where it is not built."""
    if CUDA.native is None or combinations() == "all" or rule in combinations().split(","):
        return COMPILED
    moment = BF16 if rule in {listed.name for listed in ELEMENT_WISE} else F32
    return [Storage(F32, F32, F32), Storage(BF16, BF16, moment)]


def _module(name: str) -> str:
    assert CUDA.native is not None, CUDA.unavailable()
    return str(getattr(CUDA.native, name))


def _is_current() -> bool:
    build = ROOT / "build" / f"native-{sys.implementation.cache_tag}"
    ninja = shutil.which("ninja", path=os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]]))
    if ninja is None or not (build / "build.ninja").exists():
        return True  # built elsewhere or with make
    run = subprocess.run([ninja, "-C", build, "-n", "_cuda"], capture_output=True, text=True, check=True)
    return "Building" not in run.stdout  # what pip has linked into a folder of its own it would link again
