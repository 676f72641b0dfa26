"""The size of Adafactor's steps, and which groups leave it to a schedule of the preset's own."""

from __future__ import annotations

from typing import Any


def rho(
    math: Any,
    step: Any,
    *,
    lr: Any,
    scale_parameter: bool,
    relative_step: bool,
    warmup_init: bool,
    preset: str,
) -> Any:
    """The step's size, before it is scaled by the parameter's; lr counts only without relative_step."""
    if relative_step:
        relative = math.minimum(1e-6 * step if warmup_init else 1e-2, 1 / math.sqrt(step))
        return relative * 0.05 if preset == "bert4keras" and not scale_parameter else relative
    if lr is None:
        raise ValueError("lr must be given without relative_step, got None")
    return math.minimum(lr, 1 / math.sqrt(step)) if preset == "torch" else lr


# the settings of a group that it takes
OF_RHO = ("lr", "scale_parameter", "relative_step", "warmup_init", "preset")


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
