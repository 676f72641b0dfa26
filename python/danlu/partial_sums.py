"""Where a rule that reduces stops: its sums over the part of a parameter that is here."""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass
from typing import TypeAlias

import torch


@dataclass(slots=True)
class PartialSums:
    """Sums over some dimensions of a parameter.

    Whoever has other parts of the parameter may add theirs, values and count, before the rule goes on: it
    takes what it finds for the whole.
    """

    values: torch.Tensor  # float64, of the parameter's shape with 1 in the dimensions that are summed over
    dims: tuple[int, ...]  # these dimensions
    count: int  # of elements in each value

    @classmethod
    def over(cls, x: torch.Tensor, dims: tuple[int, ...] | None = None) -> PartialSums:
        """Of x, in float64; dims: None for all."""
        dims = tuple(range(x.ndim)) if dims is None else dims
        count = 1
        for dim in dims:
            count *= x.shape[dim]
        values = x.double()
        return cls(values.sum(dims, keepdim=True) if dims else values.clone(), dims, count)

    def mean(self) -> torch.Tensor:
        return self.values / self.count


@dataclass(frozen=True)
class Statistic:
    """A sum that a rule takes over dimensions of a parameter."""

    dims: tuple[int, ...]
    kept_out: tuple[int, ...] = ()  # further dimensions that its values do not have
    # of what multiplies the gradient, by which the sum may be multiplied afterwards; None: it may not
    power: int | None = None

    @classmethod
    def of_all(cls, shape: tuple[int, ...]) -> Statistic:
        return cls(tuple(range(len(shape))))

    def shape(self, part: tuple[int, ...]) -> tuple[int, ...]:
        """Of its values for a part of that shape."""
        return tuple(1 if d in (*self.dims, *self.kept_out) else size for d, size in enumerate(part))

    def count(self, whole: tuple[int, ...]) -> int:
        """Of elements in each value."""
        return math.prod(whole[d] for d in self.dims)


# a reference that reduces: stops with all sums of a pass, and returns what others return
Reducing: TypeAlias = Generator[list[PartialSums], None, torch.Tensor]
# dimensions that sums along rows are over, and sums along columns, see `FusedOptimizer.summed_dims`
SummedDims: TypeAlias = tuple[tuple[int, ...], tuple[int, ...]]
