"""The norm over all gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def total_norm(gradients: Sequence[torch.Tensor]) -> torch.Tensor:
    """sqrt of the sum of squares over all tensors, float64 on the first one's device; nothing synchronizes
    where all are on one device.

    NaN and infinities show. A DTensor counts with all its shards.
    """
    if not gradients:
        return torch.zeros((), dtype=torch.float64)
    norms = []
    for g in gradients:
        norm = torch.linalg.vector_norm(g.detach(), dtype=torch.float64)
        full = getattr(norm, "full_tensor", None)
        norms.append((norm if full is None else full()).to(gradients[0].device))
    return torch.stack(norms).square().sum().sqrt()
