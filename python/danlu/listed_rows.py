"""The rows of a gradient that take part in a lazy step."""

from __future__ import annotations

from typing import NamedTuple

import torch


class ListedRows(NamedTuple):
    """The rows of a gradient that take part.

    rows: int64, ascending, each once. values: contiguous, rows of the gradient; of a gradient that lists rows
    its entries, in the order in which they are listed. permutation, offsets: int64; those of rows[i] are
    values[permutation[offsets[i - 1]:offsets[i]]]. offsets is None where each row has one entry, permutation
    where rows[i] has values[i].
    """

    rows: torch.Tensor
    values: torch.Tensor
    permutation: torch.Tensor | None
    offsets: torch.Tensor | None


def listed_rows(g: torch.Tensor) -> ListedRows:
    """Looks at the indices alone, whether or not they are marked as coalesced."""
    return in_order(g._indices()[0], g._values().detach().contiguous())


def in_order(rows: torch.Tensor, values: torch.Tensor) -> ListedRows:
    """Of a row number for each row of values; rows, permutation and offsets are where the numbers are."""
    if bool((rows.diff() > 0).all()):
        return ListedRows(rows.contiguous(), values, None, None)
    ascending, permutation = rows.sort(stable=True)
    rows, counts = torch.unique_consecutive(ascending, return_counts=True)
    return ListedRows(rows, values, permutation, counts.cumsum(0) if len(rows) < len(permutation) else None)


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
    rows, values, permutation, offsets = listed
    if permutation is None:
        return SummedRows(rows, values)
    if offsets is None:
        return SummedRows(rows, values[permutation.to(values.device)])
    where = values.device if values.device.type in ("cpu", "cuda") else torch.device("cpu")
    # a dimension more, since sums of numbers alone are taken in another order on a GPU
    entries = values[permutation.to(values.device)].unsqueeze(-1).to(where)
    lengths = offsets.diff(prepend=offsets.new_zeros(1)).to(where)
    # -0.0 changes no number that is added to it
    sums = torch.segment_reduce(entries, "sum", lengths=lengths, unsafe=True, initial=-0.0)
    return SummedRows(rows, sums.squeeze(-1).to(values.device))


def rows_taking_part(g: torch.Tensor, rows: torch.Tensor | None = None) -> SummedRows:
    """Those that a COO gradient lists, or those of a dense one that are not all zero; NaN is not zero.

    rows: those of a dense gradient, where they are known.
    """
    if g.layout == torch.sparse_coo:
        return summed_rows(g)
    rows = nonzero_rows(g) if rows is None else rows
    return SummedRows(rows, g.detach()[rows])


def nonzero_rows(g: torch.Tensor) -> torch.Tensor:
    """Those of a dense gradient that are not all zero, ascending; NaN is not zero."""
    g = g.detach()
    return (g if g.ndim == 1 else g.flatten(1).any(1)).nonzero()[:, 0]


def values_of(g: torch.Tensor) -> torch.Tensor:
    """A dense tensor of the same norm."""
    return summed_rows(g).values if g.layout == torch.sparse_coo else g
