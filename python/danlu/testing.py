"""Comparisons for tests of kernels against references."""

from __future__ import annotations

import torch

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors are equal as bit patterns, all NaNs being equal.

    `torch.equal` calls -0 equal to 0 and NaN unequal to itself; NaN payloads differ between torch and GPUs.
    Tensors of different dtype or shape are not equal.

    >>> same_bits(torch.tensor([0.0, float("nan")]), torch.tensor([0.0, float("nan")]))
    True
    >>> same_bits(torch.tensor(0.0), torch.tensor(-0.0))
    False
    """
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    a, b = a.detach(), b.detach()
    kind = _INTEGERS[a.element_size()]
    equal = a.contiguous().view(kind) == b.contiguous().view(kind)
    return bool((equal | (a.isnan() & b.isnan())).all())
