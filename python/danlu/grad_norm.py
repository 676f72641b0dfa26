"""The norm over all gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch


def total_norm(gradients: Sequence[torch.Tensor]) -> float:
    """sqrt of the sum of squares over all tensors, accumulated in float64; NaN and infinities show.

    A DTensor counts with all its shards.
    """
    squares = 0.0
    for g in gradients:
        norm = torch.linalg.vector_norm(g.detach(), dtype=torch.float64)
        full = getattr(norm, "full_tensor", None)
        squares += float(norm if full is None else full()) ** 2
    return math.sqrt(squares)
