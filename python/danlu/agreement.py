"""What all ranks agree on before any of them writes: five numbers in a step's first all-reduces."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from .exchange import Request

# ranks, ranks that failed, ranks that found infinities, a hash of each rank and its square
NUMBERS = 5


class Verdict(NamedTuple):
    """What came back: whether any rank failed or found infinities, and whether all hashes are equal."""

    failed: bool
    found_inf: bool
    same: bool


class Agreement:
    """One rank's word to all that it shares a group with, and what came back.

    hashed: what has to be the same everywhere. All hashes h are equal if and only if ranks * sum(h^2) is
    sum(h)^2. A rank counts as often as the groups, one after the other, repeat it; h has as few bits as keep
    every sum exact in float64.
    """

    def __init__(
        self,
        groups: Sequence[Any],
        device: torch.device,
        hashed: bytes,
        *,
        failed: bool = False,
        found_inf: torch.Tensor | None = None,
    ) -> None:
        repeats = math.prod(group.size() for group in groups)
        bits = (53 - math.ceil(math.log2(repeats))) // 2
        h = float(zlib.crc32(hashed) % 2 ** min(bits, 32))
        numbers = torch.tensor([1.0, failed, 0.0, h, h * h], dtype=torch.float64, device=device)
        if found_inf is not None:
            numbers[2] = found_inf != 0
        self.request = Request(numbers, tuple(groups), device)

    def verdict(self) -> Verdict:
        """Waits for the device."""
        ranks, failed, found_inf, h, squares = map(int, self.request.values.tolist())
        return Verdict(failed != 0, found_inf != 0, ranks * squares == h * h)

    def refusal(self) -> torch.Tensor:
        """float32 on the device, not 0 where no rank may write; without waiting."""
        ranks, failed, found_inf, h, squares = self.request.values.long().unbind()
        return (failed.bool() | found_inf.bool() | (ranks * squares != h * h)).float()
