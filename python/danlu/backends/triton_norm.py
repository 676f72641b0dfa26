"""Launches of the Triton kernels that take the norm over all gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..spec import ParamSpec
from .staged_table import StagedTable
from .triton_loading import load

if TYPE_CHECKING:
    from .._cpu import AddressList


class ChunkMap:
    """Which chunk of which tensor each program takes; `places`: chunk_tensors, chunk_indices."""

    def __init__(self, sizes: Sequence[int], chunk_size: int, device: torch.device) -> None:
        chunks = [-(-size // chunk_size) for size in sizes]
        self.programs = sum(chunks)
        tensors = [i for i, count in enumerate(chunks) for _ in range(count)]
        within = [c for count in chunks for c in range(count)]
        self.places = (
            torch.tensor(tensors, dtype=torch.int32, device=device),
            torch.tensor(within, dtype=torch.int32, device=device),
        )


class GradientNorm:
    """The norm over the gradients of a native list of parameters: a launch for each dtype, and one more.

    kind: Triton's dtype of a format; block: elements of a turn for a format; options: of the compiler.
    """

    def __init__(
        self,
        native: AddressList,
        specs: Sequence[ParamSpec],
        max_norm: float,
        chunk_size: int,
        kind: Callable[[str], Any],
        block: Callable[[str], int],
        options: dict[str, Any],
    ) -> None:
        device = specs[0].param.device
        self._native = native
        self._options = options
        self._max_norm = torch.full((), max_norm, dtype=torch.float64, device=device)
        self._one = torch.ones((), device=device)
        alike: dict[str, list[int]] = {}
        for i, spec in enumerate(specs):
            if math.prod(spec.shape):
                alike.setdefault(spec.formats[1], []).append(i)
        self._launches = []
        for dtype, indices in alike.items():
            chunks = ChunkMap([math.prod(specs[i].shape) for i in indices], chunk_size, device)
            constants = dict(DTYPE=kind(dtype), BLOCK=block(dtype), CHUNK=chunk_size, **options)
            # two halves at multiples of 16 bytes, whatever their number
            addresses = StagedTable(16 * (len(indices) + len(indices) % 2), device)
            self._launches.append(_Squares(native.select(indices), addresses, chunks, constants))
        programs = sum(launch.chunks.programs for launch in self._launches)
        self._sums = torch.zeros(programs, dtype=torch.float64, device=device)
        self._loaded = not options  # by the interpreter

    @property
    def tables(self) -> list[torch.Tensor]:
        of_launches = [t for one in self._launches for t in (one.addresses.table, *one.chunks.places)]
        return [self._max_norm, self._one, self._sums, *of_launches]

    def enqueue(self, result: torch.Tensor, grad_scale: torch.Tensor | None, *, capturing: bool) -> None:
        """Writes the squares, float64, and behind them the factor that unscales and clips, float32."""
        from ..triton_kernels import norm

        begin = 0
        calls: list[tuple[Any, int, tuple[Any, ...], dict[str, Any]]] = []
        for launch in self._launches:
            sent = launch.addresses.send(self._native.gradients(launch.selection), capturing=capturing)
            addresses, sizes = sent.view(torch.int64).view(2, -1)
            sums = self._sums[begin:]
            begin += launch.chunks.programs
            arguments = (addresses, sizes, *launch.chunks.places, sums)
            calls.append((norm.squares, launch.chunks.programs, arguments, launch.constants))
        scale = self._one if grad_scale is None else grad_scale
        calls.append((norm.norm, 1, (self._sums, begin, self._max_norm, scale, result), self._options))
        if not self._loaded:
            load(
                [kernel.warmup(*a, grid=(programs,), **k) for kernel, programs, a, k in calls],
                capturing=capturing,
            )
            self._loaded = True
        for kernel, programs, arguments, constants in calls:
            kernel[(programs,)](*arguments, **constants)


@dataclass
class _Squares:
    """The gradients of one dtype."""

    selection: int
    addresses: StagedTable
    chunks: ChunkMap
    constants: dict[str, Any]
