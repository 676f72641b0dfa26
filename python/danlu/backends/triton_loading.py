"""When Triton's kernels are loaded onto a device."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def load(kernels: Iterable[Any], *, capturing: bool) -> None:
    """Loads what `warmup` has compiled, which Triton leaves to the first launch, so that it can fail when
    other launches have been made. No capture allows it: raises there, unless all are loaded.
    """
    for kernel in kernels:
        if kernel.module is not None:
            continue
        if capturing:
            raise RuntimeError(
                f"a step inside a CUDA graph's capture needs kernels that are loaded, {kernel.name} is not: "
                "take such a step before the capture"
            )
        kernel[(1, 1, 1)]  # a launcher, which is not called
