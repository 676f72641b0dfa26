"""The backends, and which ones a tensor may take."""

from __future__ import annotations

import torch

from ..spec import Backend
from .cpu import CPU
from .cuda import CUDA
from .reference import REFERENCE as REFERENCE
from .triton import TRITON

BACKENDS: dict[str, Backend] = {b.name: b for b in (REFERENCE, CPU, CUDA, TRITON)}
NATIVE = tuple(b for b in BACKENDS.values() if b is not REFERENCE)


def resolve(backend: str, fused: bool | None) -> str:
    """The backend that both arguments ask for; raises where they contradict or ask for what is missing."""
    if backend != "auto" and backend not in BACKENDS:
        allowed = ", ".join(repr(name) for name in ("auto", *BACKENDS))
        raise ValueError(f"backend must be one of {allowed}, got {backend!r}")
    if fused is False:
        if backend not in ("auto", "reference"):
            raise ValueError(f"fused=False asks for the reference, backend={backend!r} for a native one")
        return "reference"
    if fused and backend == "reference":
        raise ValueError("fused=True asks for a native backend, backend='reference' for none")
    if backend == "auto":
        # the CPU's is asked first: to ask for a GPU initializes CUDA, which a forked child cannot undo
        if fused and all(b.unavailable() for b in NATIVE):
            reasons = {b.name: b.unavailable() for b in NATIVE}
            raise RuntimeError(f"fused=True, but no native backend is available: {reasons}")
        return backend
    reason = BACKENDS[backend].unavailable()
    if reason:
        raise RuntimeError(f"backend={backend!r} is not available: {reason}")
    return backend


def candidates(setting: str, device: torch.device) -> list[Backend]:
    """The backends to try for a tensor on `device`, the reference last."""
    if setting == "reference":
        return [REFERENCE]
    if setting == "auto":
        return [b for b in NATIVE if device.type in b.device_types] + [REFERENCE]
    return [BACKENDS[setting], REFERENCE]
