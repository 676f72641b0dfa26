"""The backends: what a plan needs of them, and which ones a tensor may take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from ..gradient_scale import GradientScale
    from ..optimizer import FusedOptimizer
    from ..plan import Entry


class Part(Protocol):
    """The parameters of a plan that one backend takes on one device. A step calls these in their order."""

    captured: bool  # whether a graph has recorded a step of it

    def gather(self, optimizer: FusedOptimizer) -> bool:
        """Reads and validates what the step needs, writes nothing; False if the plan is out of date."""
        ...

    @property
    def reads_host(self) -> bool:
        """Whether the host has to know if the step counts; else a device decides."""
        ...

    def gradient_squares(self) -> torch.Tensor | float:
        """The sum of squares of all gradients that `gather` found, in float64."""
        ...

    def prepare(self, optimizer: FusedOptimizer, scale: GradientScale) -> None:
        """Folds coefficients; `scale` multiplies every gradient, beside the sign of its group's maximize."""
        ...

    def run(self) -> None:
        """Advances the counters and updates parameters and states."""
        ...

    def release(self) -> None:
        """Lets go of what the step held, also after a step that failed."""
        ...


class Backend(Protocol):
    """One way to run a step."""

    name: str
    reason: str  # why a tensor takes it, where nothing faster refused

    @property
    def device_types(self) -> tuple[str, ...]:
        """Of the tensors that it could take; empty for any."""
        ...

    def unavailable(self) -> str | None:
        """Why it cannot run here; None if it can."""
        ...

    def refusal(self, entry: Entry) -> str | None:
        """Why it cannot take this parameter; None if it can."""
        ...

    def part(self, optimizer: FusedOptimizer, entries: Sequence[Entry]) -> Part: ...


from .cpu import CPU  # noqa: E402
from .cuda import CUDA  # noqa: E402
from .reference import REFERENCE as REFERENCE  # noqa: E402
from .triton import TRITON  # noqa: E402

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
