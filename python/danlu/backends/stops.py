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


def partial_sums(spec: ParamSpec, summed: SummedDims, arrays: Sequence[Array]) -> list[PartialSums]:
    """Views of the arrays, in the parameter's shape."""
    along_rows, along_columns = summed
    rows, columns, size = counts(spec, (), ())
    kinds = {
        "rows": (along_rows, columns),
        "columns": (along_columns, rows),
        "both": (tuple(sorted((*along_rows, *along_columns))), rows * columns),
        "averages": (along_columns, rows),
        "row": (along_rows, columns),
        "tensor": (tuple(range(len(spec.shape))), size),
    }
    found = []
    for of, values in arrays:
        dims, count = kinds[of]
        gone = {*dims, *along_rows} if of == "averages" else dims
        shape = [1 if d in gone else n for d, n in enumerate(spec.shape)]
        found.append(PartialSums(values.view(shape), dims, count))
    return found


def counts(spec: ParamSpec, arrays: Sequence[Array], found: Sequence[PartialSums]) -> tuple[int, int, int]:
    """Rows, columns and elements of the tensor that sums are of by now."""
    batch, rows, columns = spec.matrix or (1, 1, math.prod(spec.shape))
    size = batch * rows * columns
    for (of, _), sums in zip(arrays, found, strict=True):
        if of in ("columns", "averages"):
            rows = sums.count
        elif of in ("rows", "row"):
            columns = sums.count
        elif of == "tensor":
            size = sums.count
    return rows, columns, size
