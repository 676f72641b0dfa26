"""What a group of Adafactor may say, and what follows from it."""

from __future__ import annotations

from typing import Any

from .. import checks
from .adafactor_presets import NEUTRAL, PRESETS


def settled(group: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """What a group says, with what follows from it: an lr turns relative_step off, lr=None turns it on, and
    relative_step=True alone leaves the default lr out. In optax, lr=None is 1.
    """
    group = dict(group)
    if defaults["preset"] == "optax" and group.get("lr", 1.0) is None:
        group["lr"] = 1.0
    if "relative_step" not in defaults:
        return group
    if "relative_step" in group:
        if group["relative_step"]:
            group.setdefault("lr", None)
    elif "lr" in group:
        group["relative_step"] = group["lr"] is None
    if not group.get("relative_step", True) and "warmup_init" in defaults:
        group.setdefault("warmup_init", False)
    return group


def refuse_both(group: dict[str, Any]) -> None:
    """Raises if a group that is new says both what its lr is and that it has a schedule."""
    if group.get("lr") is not None and group.get("relative_step"):
        raise ValueError("lr must be None with relative_step=True")


def refuse_foreign(preset: str, given: dict[str, Any]) -> None:
    """Raises for options that the preset does not have."""
    for name in given:
        if name in NEUTRAL and name not in PRESETS[preset].options:
            raise ValueError(f"{name} is no option of the preset {preset!r}")


def check(*, lr: Any, eps: Any, preset: str, **options: Any) -> None:
    """Raises ValueError for an option out of its range."""
    if not options.get("relative_step"):  # else lr shows what the schedule says
        if lr is None:
            without = " without relative_step" if "relative_step" in options else ""
            raise ValueError(f"lr must be given in the preset {preset!r}{without}, got None")
        checks.learning_rate(lr)
        if options.get("warmup_init"):
            raise ValueError("warmup_init=True needs relative_step=True")
    if "min_dim_size_to_factor" in options:
        checks.positive_int("min_dim_size_to_factor", options["min_dim_size_to_factor"])
    checks.pair("eps", eps)
    if eps[0] is not None or preset != "torch":
        checks.at_least_zero("eps[0]", eps[0])
    checks.at_least_zero("eps[1]", eps[1])
    clip = options["clip_threshold"]
    if clip is not None:
        checks.at_least_zero("clip_threshold", clip)
        if clip == 0:
            raise ValueError("clip_threshold must be greater than 0, got 0; None turns it off")
    checks.at_most_zero("decay_rate", options["decay_rate"])
    if options.get("beta1") is not None:
        checks.unit_interval("beta1", options["beta1"])
    if options["beta2_cap"] is not None:
        checks.unit_interval("beta2_cap", options["beta2_cap"])
    if "weight_decay" in options:
        checks.at_least_zero("weight_decay", options["weight_decay"])
