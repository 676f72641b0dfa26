"""The norm over all gradients, from the sums of squares of a plan's parts."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .listed_rows import values_of


def sum_of_squares(gradients: Sequence[torch.Tensor]) -> torch.Tensor | float:
    """Over all tensors, in float64, on their device; only COO tensors synchronize. NaN and infinities show.

    A DTensor counts with all its shards, a COO tensor with the sums of each row's entries.
    """
    norms = []
    for g in gradients:
        norm = torch.linalg.vector_norm(values_of(g).detach(), dtype=torch.float64)
        full = getattr(norm, "full_tensor", None)
        norms.append(norm if full is None else full())
    return torch.stack(norms).square().sum() if norms else 0.0
