"""optax.lion in a process of its own: jax starts threads, and other tests fork."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np


def lion(
    folder: Path, start: np.ndarray, gradients: np.ndarray, lrs: Sequence[float], hyper: Sequence[float]
) -> tuple[np.ndarray, np.ndarray]:
    """Parameter and momentum after all gradients (first axis); `hyper` is beta1, beta2, weight_decay."""
    given, result = folder / "given.npz", folder / "result.npz"
    np.savez(given, start=start, gradients=gradients, lrs=np.array(lrs), hyper=np.array(hyper))
    env = {**os.environ, "JAX_ENABLE_X64": "1", "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, __file__, given, result], check=True, env=env)
    with np.load(result) as arrays:
        return arrays["p"], arrays["m"]


def main(given: str, result: str) -> None:
    import jax
    import optax

    with np.load(given) as arrays:
        p = jax.numpy.asarray(arrays["start"])
        gradients, lrs = arrays["gradients"], arrays["lrs"].tolist()
        beta1, beta2, weight_decay = arrays["hyper"].tolist()

    def rule(lr: float) -> optax.GradientTransformation:
        return optax.lion(lr, beta1, beta2, weight_decay=weight_decay)

    state = rule(lrs[0]).init(p)
    for g, lr in zip(gradients, lrs, strict=True):
        updates, state = rule(lr).update(jax.numpy.asarray(g), state, p)
        p = optax.apply_updates(p, updates)
    np.savez(result, p=p, m=state[0].mu)


if __name__ == "__main__":
    main(*sys.argv[1:])
