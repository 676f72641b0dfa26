"""The sums of a tensor where a native step stops, as whoever waits there sees them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

import torch

from ..partial_sums import PartialSums, SummedDims
from ..spec import ParamSpec

# What an array is of: "rows", "columns", whole matrices ("both"), the "averages" of rows; the "tensor", or
# each "row" by itself. Its float64 numbers.
Array: TypeAlias = tuple[str, torch.Tensor]


# which of rows, columns, elements of a tensor the count of a sum is
COUNTED = {"columns": 0, "averages": 0, "rows": 1, "row": 1, "tensor": 2}


class TensorSums:
    """What a tensor leaves at a stop, in arrays that stay from step to step."""

    def __init__(self, spec: ParamSpec, summed: SummedDims, arrays: Sequence[Array]) -> None:
        along_rows, along_columns = summed
        rows, columns, size = whole_counts(spec)
        kinds = {
            "rows": (along_rows, columns),
            "columns": (along_columns, rows),
            "both": (tuple(sorted((*along_rows, *along_columns))), rows * columns),
            "averages": (along_columns, rows),
            "row": (along_rows, columns),
            "tensor": (tuple(range(len(spec.shape))), size),
        }
        self._views = []
        for of, values in arrays:
            dims, count = kinds[of]
            gone = {*dims, *along_rows} if of == "averages" else dims
            shape = [1 if d in gone else n for d, n in enumerate(spec.shape)]
            self._views.append((values.view(shape), dims, count))
        self._counted = [COUNTED.get(of) for of, _ in arrays]

    def now(self) -> list[PartialSums]:
        """Views of the arrays, in the parameter's shape."""
        return [PartialSums(*view) for view in self._views]

    def take_counts(self, found: Sequence[PartialSums], counts: list[int]) -> bool:
        """Writes what sums are of by now into rows, columns and elements; False if they are as before."""
        before = [*counts]
        for place, sums in zip(self._counted, found, strict=True):
            if place is not None:
                counts[place] = sums.count
        return counts != before


def whole_counts(spec: ParamSpec) -> list[int]:
    """Rows, columns and elements of the part that is here."""
    batch, rows, columns = spec.matrix or (1, 1, math.prod(spec.shape))
    return [rows, columns, batch * rows * columns]
