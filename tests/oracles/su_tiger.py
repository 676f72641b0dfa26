"""Tiger as its author's Keras code has it (github.com/bojone/tiger), in numpy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def tiger(
    var: np.ndarray,
    gradients: Sequence[np.ndarray],
    kind: str,
    *,
    lr: float,
    beta: float,
    weight_decay: float,
    accumulation_steps: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Variable and momentum after all gradients; there the kind is read off the variable's name."""
    m, k = np.zeros_like(var), accumulation_steps
    for t, g in enumerate(gradients):
        rate = lr if (t + 1) % k == 0 else 0.0
        m = (beta if t % k == 0 else 1.0) * m + (1 - beta) / k * g
        if kind == "vector":
            rate, decay = 0.5 * rate, 0.0
        else:
            axis = -1 if kind == "embedding" and var.ndim else None
            rate, decay = rate * np.sqrt(np.mean(var**2, axis=axis, keepdims=True)), weight_decay
        var = var - (np.sign(m) + decay * var) * rate
    return var, m
