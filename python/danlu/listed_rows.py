"""The rows of a gradient that take part in a lazy step."""

from __future__ import annotations

from typing import NamedTuple

import torch


class ListedRows(NamedTuple):
    """The rows of a gradient that take part. rows: int64, ascending, each once. values: contiguous, rows of
    the gradient: of one that lists rows its entries, in the order in which they are listed. order, ends:
    int64; those of rows[i] are values[order[ends[i - 1]:ends[i]]]. ends is None where each row has one, order
    where rows[i] has values[i].
    """

    rows: torch.Tensor
    values: torch.Tensor
    order: torch.Tensor | None
    ends: torch.Tensor | None


def listed_rows(g: torch.Tensor) -> ListedRows:
    """Looks at the indices alone, whether or not they are marked as coalesced."""
    return in_order(g._indices()[0], g._values().detach().contiguous())


def in_order(rows: torch.Tensor, values: torch.Tensor) -> ListedRows:
    """Of a row number for each row of values; rows, order and ends are where the numbers are."""
    if bool((rows.diff() > 0).all()):
        return ListedRows(rows.contiguous(), values, None, None)
    ascending, order = rows.sort(stable=True)
    rows, counts = torch.unique_consecutive(ascending, return_counts=True)
    return ListedRows(rows, values, order, counts.cumsum(0) if len(rows) < len(order) else None)


class SummedRows(NamedTuple):
    """rows: int64, ascending, each once. values: contiguous, one row of the gradient for each of them."""

    rows: torch.Tensor
    values: torch.Tensor


def summed_rows(g: torch.Tensor) -> SummedRows:
    """The rows that a COO gradient lists, with the sums of their entries."""
    return summed(listed_rows(g))


def summed(listed: ListedRows) -> SummedRows:
    """The entries of each row summed in their order, each sum rounded to the gradient's dtype.

    Not by `coalesce`, which sums three entries and more in an order that the processor decides.
    """
    rows, values, order, ends = listed
    if order is None:
        return SummedRows(rows, values)
    if ends is None:
        return SummedRows(rows, values[order.to(values.device)])
    where = values.device if values.device.type in ("cpu", "cuda") else torch.device("cpu")
    # a dimension more, since sums of numbers alone are taken in another order on a GPU
    entries = values[order.to(values.device)].unsqueeze(-1).to(where)
    lengths = ends.diff(prepend=ends.new_zeros(1)).to(where)
    # -0.0 changes no number that is added to it
    sums = torch.segment_reduce(entries, "sum", lengths=lengths, unsafe=True, initial=-0.0)
    return SummedRows(rows, sums.squeeze(-1).to(values.device))


def rows_taking_part(g: torch.Tensor) -> SummedRows:
    """Those that a COO gradient lists, or those of a dense one that are not all zero; NaN is not zero."""
    if g.layout == torch.sparse_coo:
        return summed_rows(g)
    rows = nonzero_rows(g)
    return SummedRows(rows, g.detach()[rows])


def nonzero_rows(g: torch.Tensor) -> torch.Tensor:
    """Those of a dense gradient that are not all zero, ascending; NaN is not zero."""
    g = g.detach()
    return (g if g.ndim == 1 else g.flatten(1).any(1)).nonzero()[:, 0]


def values_of(g: torch.Tensor) -> torch.Tensor:
    """A dense tensor of the same norm."""
    return summed_rows(g).values if g.layout == torch.sparse_coo else g
