"""Backends that this version names and does not have yet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..optimizer import FusedOptimizer
    from ..plan import Entry
    from . import Part


class MissingBackend:
    """Says what is missing wherever it is asked."""

    reason = ""

    def __init__(self, name: str, device_types: tuple[str, ...], what: str) -> None:
        self.name = name
        self.device_types = device_types
        self._what = what

    def unavailable(self) -> str:
        return self._what

    def refusal(self, entry: Entry) -> str:
        return self._what

    def part(self, optimizer: FusedOptimizer, entries: Sequence[Entry]) -> Part:
        raise RuntimeError(self._what)


TRITON = MissingBackend("triton", ("cuda",), "this version of danlu has no Triton kernels")
