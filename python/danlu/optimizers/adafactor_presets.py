"""What the libraries mean by Adafactor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# what an option is worth in a preset that does not have it
NEUTRAL: dict[str, Any] = dict(
    lr=None,
    eps=(1e-30, 1e-3),
    clip_threshold=None,
    decay_rate=-0.8,
    beta1=None,
    weight_decay=0.0,
    scale_parameter=False,
    relative_step=False,
    warmup_init=False,
    beta2_cap=None,
    min_dim_size_to_factor=0,
)


@dataclass(frozen=True)
class Preset:
    """The options of a library with their defaults, and what cannot be chosen there."""

    options: Mapping[str, Any]
    largest: bool = False  # the two largest dimensions are factored, else the last two
    decay: str = "none"  # the decay coefficient: wd * alpha, lr * wd, wd, or none
    clamped: bool = False  # eps1 bounds averages from below instead of being added to squares
    eps_under_root: bool = False  # added once more
    momentum_first: bool = False  # the momentum averages what alpha multiplies

    def dims(self, shape: Sequence[int], from_size: int) -> tuple[int, int] | None:
        """The two dimensions to factor, in their order, if the smaller of them has that size; None if the
        second moment is kept as it is.
        """
        if len(shape) < 2:
            return None
        order = sorted(range(len(shape)), key=lambda d: shape[d]) if self.largest else range(len(shape))
        first, second = sorted(order[-2:])
        return (first, second) if min(shape[first], shape[second]) >= from_size else None


_COMMON = dict(lr=None, eps=(1e-30, 1e-3), clip_threshold=1.0, decay_rate=-0.8, beta2_cap=None)

PRESETS = {
    "huggingface": Preset(
        dict(
            _COMMON,
            beta1=None,
            weight_decay=0.0,
            scale_parameter=True,
            relative_step=True,
            warmup_init=False,
        ),
        decay="wd * alpha",
    ),
    "torch": Preset(
        dict(_COMMON, lr=1e-2, eps=(None, 1e-3), weight_decay=0.0), decay="lr * wd", clamped=True
    ),
    "optax": Preset(
        dict(
            _COMMON,
            lr=1.0,
            beta1=None,
            weight_decay=0.0,
            scale_parameter=True,
            min_dim_size_to_factor=128,
        ),
        largest=True,
        decay="wd",
    ),
    "big_vision": Preset(
        dict(
            _COMMON,
            clip_threshold=None,
            beta1=0.9,
            weight_decay=0.0,
            beta2_cap=0.999,
            min_dim_size_to_factor=32,
        ),
        largest=True,
        decay="wd",
        momentum_first=True,
    ),
    "bert4keras": Preset(
        dict(
            _COMMON,
            lr=1e-3,
            beta1=None,
            scale_parameter=True,
            relative_step=False,
            min_dim_size_to_factor=128,
        ),
        largest=True,
        eps_under_root=True,
        momentum_first=True,
    ),
}
