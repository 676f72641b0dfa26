"""The size of Adafactor's steps, and the lr that a group with the preset's own schedule shows."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from .. import scalar, scale
from .adafactor_presets import NEUTRAL


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


# the settings of a group that `rho` takes
_OF_RHO = ("lr", "scale_parameter", "relative_step", "warmup_init", "preset")


def scheduled_lr(group: dict[str, Any], made: Any, ahead: int) -> float | torch.Tensor:
    """rho of the step that is `ahead` of those made, or of the first one if that is later.

    A float64 tensor where `made` is on a device.
    """
    if scale.is_on_device(made):
        step = (made.double().reshape(()) + ahead).clamp(min=1.0)
    else:
        step = max(float(made) + ahead, 1.0)
    settings: dict[str, Any] = {name: group.get(name, NEUTRAL.get(name)) for name in _OF_RHO}
    lr = rho(scalar, step, **settings)
    return lr if isinstance(lr, torch.Tensor) else float(lr)


def show_lr(group: dict[str, Any], lr: float | torch.Tensor) -> None:
    """Writes it where users and schedulers read a group's lr; no step reads it."""
    shown: Any = group.get("lr")
    if isinstance(lr, torch.Tensor) and scale.is_on_device(lr) and scale.is_on_device(shown):
        shown.copy_(lr)  # where the replays of a captured step write it, too
    else:
        group["lr"] = lr


def warn_of_schedulers(groups: list[dict[str, Any]]) -> bool:
    """Whether a scheduler has written an lr that steps ignore."""
    for index, group in enumerate(groups):
        # torch's schedulers leave initial_lr there, those that only report do not
        if "initial_lr" in group and group.get("relative_step"):
            warnings.warn(
                f"a scheduler has written the lr of param_groups[{index}], which steps ignore because of "
                "relative_step=True; give the optimizer an lr, or take danlu.RelativeStepLR to report it",
                stacklevel=2,
            )
            return True
    return False
