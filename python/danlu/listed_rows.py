"""The rows of a gradient that take part in a lazy step."""

from __future__ import annotations

from typing import NamedTuple

import torch


class ListedRows(NamedTuple):
    """The rows that a COO gradient lists. rows: int64, ascending, each once. values: contiguous, a row of the
    gradient for each entry, in the order in which they are listed. order, ends: int64; the entries of rows[i]
    are order[ends[i - 1]:ends[i]]. None where each row has one entry and they ascend.
    """

    rows: torch.Tensor
    values: torch.Tensor
    order: torch.Tensor | None
    ends: torch.Tensor | None


def listed_rows(g: torch.Tensor) -> ListedRows:
    """Looks at the indices alone, whether or not they are marked as coalesced."""
    rows, values = g._indices()[0], g._values().detach().contiguous()
    if bool((rows.diff() > 0).all()):
        return ListedRows(rows.contiguous(), values, None, None)
    in_order, order = rows.sort(stable=True)
    rows, counts = torch.unique_consecutive(in_order, return_counts=True)
    return ListedRows(rows, values, order, counts.cumsum(0))


class SummedRows(NamedTuple):
    """rows: int64, ascending, each once. values: contiguous, one row of the gradient for each of them."""

    rows: torch.Tensor
    values: torch.Tensor


def summed_rows(g: torch.Tensor) -> SummedRows:
    """The rows that a COO gradient lists, the entries of each summed in their order, each sum rounded to the
    gradient's dtype.

    Not by `coalesce`, which sums three entries and more in an order that the processor decides.
    """
    rows, values, order, ends = listed_rows(g)
    if order is None or ends is None:
        return SummedRows(rows, values)
    lengths = ends.diff(prepend=ends.new_zeros(1))
    # -0.0 changes no number that is added to it
    return SummedRows(rows, torch.segment_reduce(values[order], "sum", lengths=lengths, initial=-0.0))


def rows_taking_part(g: torch.Tensor) -> SummedRows:
    """Those that a COO gradient lists, or those of a dense one that are not all zero; NaN is not zero."""
    if g.layout == torch.sparse_coo:
        return summed_rows(g)
    nonzero = g.detach() != 0
    if g.ndim > 1:
        nonzero = nonzero.flatten(1).any(1)
    rows = nonzero.nonzero()[:, 0]
    return SummedRows(rows, g.detach()[rows])


def values_of(g: torch.Tensor) -> torch.Tensor:
    """A dense tensor of the same norm."""
    return summed_rows(g).values if g.layout == torch.sparse_coo else g
