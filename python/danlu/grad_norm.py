"""The norm over all gradients of this rank, from the sums of squares of a plan's parts."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .listed_rows import values_of
from .sharding import local


def sum_of_squares(gradients: Sequence[torch.Tensor]) -> torch.Tensor | float:
    """Over all tensors, in float64, on their device; only COO tensors synchronize. NaN and infinities show.

    A DTensor counts with the shard that is here, a COO tensor with the sums of each row's entries.
    """
    norms = [torch.linalg.vector_norm(values_of(local(g)).detach(), dtype=torch.float64) for g in gradients]
    return torch.stack(norms).square().sum() if norms else 0.0
