"""The rows of a gradient that take part in a lazy step."""

from __future__ import annotations

from typing import NamedTuple

import torch


class ListedRows(NamedTuple):
    """rows: int64, ascending, each once. values: contiguous, one row of the gradient for each of them."""

    rows: torch.Tensor
    values: torch.Tensor


def listed_rows(g: torch.Tensor) -> ListedRows:
    """The rows that a COO gradient lists, those listed more than once summed as torch sums them."""
    g = g.detach().coalesce()
    if not bool((g._indices()[0].diff() > 0).all()):  # marked as coalesced without being it
        g = torch.sparse_coo_tensor(
            g._indices(), g._values(), g.shape, is_coalesced=False, check_invariants=False
        ).coalesce()
    return ListedRows(g._indices()[0].contiguous(), g._values().contiguous())


def rows_taking_part(g: torch.Tensor) -> ListedRows:
    """Those that a COO gradient lists, or those of a dense one that are not all zero; NaN is not zero."""
    if g.layout == torch.sparse_coo:
        return listed_rows(g)
    nonzero = g.detach() != 0
    if g.ndim > 1:
        nonzero = nonzero.flatten(1).any(1)
    rows = nonzero.nonzero()[:, 0]
    return ListedRows(rows, g.detach()[rows])


def values_of(g: torch.Tensor) -> torch.Tensor:
    """A dense tensor of the same norm."""
    return listed_rows(g).values if g.layout == torch.sparse_coo else g
