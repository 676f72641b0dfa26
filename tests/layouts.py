"""Tensors in every order of strides and at every alignment."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from dataclasses import dataclass

import torch

Place = Callable[[torch.Tensor], torch.Tensor]


def contiguous(x: torch.Tensor) -> torch.Tensor:
    return x.clone(memory_format=torch.contiguous_format)


def permuted(*dims: int) -> Place:
    """The same shape, with memory ordered by `dims`."""

    def place(x: torch.Tensor) -> torch.Tensor:
        back = [dims.index(i) for i in range(len(dims))]
        return x.permute(dims).contiguous().permute(back)

    return place


def offset(elements: int) -> Place:
    """Contiguous, `elements` after an aligned address."""

    def place(x: torch.Tensor) -> torch.Tensor:
        room = torch.empty(x.numel() + elements, dtype=x.dtype, device=x.device)
        view = room[elements : elements + x.numel()].view(x.shape)
        view.copy_(x)
        return view

    return place


def every_second(x: torch.Tensor) -> torch.Tensor:
    """Gaps between the elements: not dense."""
    room = torch.zeros((*x.shape[:-1], 2 * x.shape[-1]), dtype=x.dtype, device=x.device)
    view = room[..., ::2]
    view.copy_(x)
    return view


def reserved(elements: int) -> torch.Tensor:
    """bf16 zeros in memory that is only taken where it is touched."""
    no_reserve = 0x4000  # Linux's MAP_NORESERVE, which Python names from 3.12 on
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    return torch.frombuffer(mmap.mmap(-1, 2 * elements, flags=flags), dtype=torch.bfloat16)


@dataclass(frozen=True)
class Layout:
    """A shape, and where a parameter and its gradient put it in memory."""

    id: str
    shape: tuple[int, ...]
    param: Place = contiguous
    grad: Place = contiguous
    native: bool = True  # whether the cpu backend takes it


LAYOUTS = [
    Layout("scalar", ()),
    Layout("one", (1,)),
    Layout("tail", (7,)),
    Layout("empty", (0,)),
    Layout("empty-3d", (3, 0, 2)),
    Layout("matrix", (33, 65)),
    Layout("ones", (1, 5, 1)),
    Layout("several-chunks", (2 * 65536 + 5,)),
    Layout("one-chunk", (65536,)),
    Layout("transposed", (40, 31), permuted(1, 0), permuted(1, 0)),
    Layout("channels-last", (5, 6, 7, 3), permuted(0, 2, 3, 1), permuted(0, 2, 3, 1)),
    Layout("any-order", (4, 9, 11), permuted(2, 0, 1), permuted(2, 0, 1)),
    Layout("param-offset-1", (1023,), offset(1)),
    Layout("grad-offset-3", (1025,), contiguous, offset(3)),
    Layout("both-offset", (6, 171), offset(5), offset(2)),
    Layout("grad-strides-differ", (12, 9), contiguous, permuted(1, 0)),
    Layout("param-strides-differ", (8, 13), permuted(1, 0), contiguous),
    Layout("grad-gaps", (5, 6), permuted(1, 0), every_second),
    Layout("grad-channels-last", (5, 6, 7, 3), contiguous, permuted(0, 2, 3, 1)),
    Layout("grad-negated", (6, 5), contiguous, lambda x: torch._neg_view(-x)),
    Layout("gaps", (10, 11), every_second, contiguous, native=False),
    Layout("grad-expanded", (9, 4), contiguous, lambda x: x[:1].expand(x.shape)),
    Layout("last-empty", (0, 4)),
]
