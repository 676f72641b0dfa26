"""Two storage formats that only tests have, on every backend: what a format needs, and nothing else."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

import danlu
from danlu.backends.triton import interpreted
from danlu.formats import Array, Format
from emulated import Emulated, cmake, load

FOLDER = Path(__file__).resolve().parent / "formats"


class Halves(Format):
    """The halves of an fp32 number, in two tensors."""

    def load(self, tensors: Sequence[torch.Tensor], index: torch.Tensor | None = None) -> torch.Tensor:
        high, low = tensors
        return (high.view(torch.int16).int() << 16 | low.int() & 0xFFFF).view(torch.float32)

    def store(
        self, numbers: torch.Tensor, tensors: Sequence[torch.Tensor], index: torch.Tensor | None = None
    ) -> None:
        bits = numbers.float().contiguous().view(torch.int32)
        tensors[0].copy_((bits >> 16).to(torch.int16).view(torch.bfloat16))
        tensors[1].copy_(bits.to(torch.int16))


class Marked(Format):
    """The bits of an fp32 number, changed by where it is in its tensor."""

    def load(self, tensors: Sequence[torch.Tensor], index: torch.Tensor | None = None) -> torch.Tensor:
        assert index is not None
        return (tensors[0] ^ mark(index)).view(torch.float32)

    def store(
        self, numbers: torch.Tensor, tensors: Sequence[torch.Tensor], index: torch.Tensor | None = None
    ) -> None:
        assert index is not None
        tensors[0].copy_(numbers.float().contiguous().view(torch.int32) ^ mark(index))


def mark(index: torch.Tensor) -> torch.Tensor:
    return ((index + 1) * (0x9E3779B97F4A7C15 - 2**64) >> 32).to(torch.int32)


HALVES = Halves("halves", (Array(torch.bfloat16), Array(torch.int16, "_low")))
MARKED = Marked("marked", (Array(torch.int32),), indexed=True)
TOYS = (HALVES, MARKED)


class Halved(danlu.AdamW):
    """Parameter and both moments in halves; a parameter is the upper one."""

    def state_format(self, name: str, p: torch.Tensor) -> Format:
        return HALVES

    def param_format(self, p: torch.Tensor) -> Format:
        return HALVES


class Mixed(danlu.AdamW):
    """An fp32 parameter, the first moment marked, the second one in halves."""

    def state_format(self, name: str, p: torch.Tensor) -> Format:
        return MARKED if name == "exp_avg" else HALVES


@functools.cache
def modules() -> tuple[ModuleType, Emulated]:
    """The CPU's module, and the CUDA backend in the emulator, with these formats and for AdamW alone."""
    settings = [
        f"-DDANLU_MORE_FORMATS={FOLDER / 'toy.h'}",
        f"-DDANLU_RULES={FOLDER / 'rules.h'}",
        "-DCMAKE_CXX_FLAGS_RELEASE=-O0",  # of all but kernels
    ]
    folder = cmake("formats", settings, ["_cpu", "_cuda_emulator"])
    return load(folder, "_cpu"), Emulated(load(folder))


def triton_formats() -> dict[str, Any]:
    """What Triton's kernels need."""
    assert interpreted()
    from interpreted.toy_kernels import FORMATS

    return FORMATS
