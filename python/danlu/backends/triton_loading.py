"""When Triton's kernels are loaded onto a device."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def load(kernels: Iterable[Any], *, capturing: bool) -> None:
    """Loads what `warmup` has compiled, which Triton leaves to the first launch, so that it can fail when
    other launches have been made. No capture allows it: raises there, unless all are loaded.
    """
    for compiled in kernels:
        if compiled is None:  # a hook of Triton's users has taken it over
            continue
        kernel = compiled.result() if hasattr(compiled, "result") else compiled  # of a compiling thread
        if not capturing:
            # a launcher, which is not called; also where `module` is set, as it is before Triton finds that
            # the device has not the threads, and raises: it does so again here
            kernel[(1, 1, 1)]
        elif kernel.module is None:
            raise RuntimeError(
                f"a step inside a CUDA graph's capture needs kernels that are loaded, {kernel.name} is not: "
                "take such a step before the capture"
            )
