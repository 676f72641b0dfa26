"""Adafactor's state_dicts of other libraries and of older versions, in this one's terms."""

from __future__ import annotations

from typing import Any

import torch

from .adafactor_options import settled
from .adafactor_presets import PRESETS

_TORCH_OPTIONS = {"beta2_decay": "decay_rate", "d": "clip_threshold"}


def translated(loaded: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """One of torch's, transformers' or danlu's Adafactor, for an optimizer of these defaults."""
    groups = [
        {_TORCH_OPTIONS.get(name, name): value for name, value in group.items() if name != "foreach"}
        for group in loaded["param_groups"]
    ]
    preset = PRESETS[defaults["preset"]]
    size = {
        name: value for name, value in preset.options.items() if name == "min_dim_size_to_factor"
    }  # before it was an option it was the preset's
    groups = [settled({**size, **group}, defaults) for group in groups]
    state = {key: _translated(value) for key, value in loaded["state"].items()}
    return {**loaded, "param_groups": groups, "state": state}


def _translated(state: Any) -> Any:
    """transformers' names and shapes of a parameter's state; torch's are ours."""
    if not isinstance(state, dict):
        return state
    found = {name: value for name, value in state.items() if name != "RMS"}
    for theirs, ours, dim in (("exp_avg_sq_row", "row_var", -1), ("exp_avg_sq_col", "col_var", -2)):
        if isinstance(found.get(theirs), torch.Tensor):
            found[ours] = found.pop(theirs).unsqueeze(dim)
    if "exp_avg_sq" in found:
        found["variance"] = found.pop("exp_avg_sq")
    return found
