"""One state_dict of a wrapper and its optimizer: how it is joined, and taken apart again."""

from __future__ import annotations

from typing import Any, ClassVar, Protocol

import torch


class Wrapped(Protocol):
    """What is asked of a wrapper, which says what each member is."""

    training_key: ClassVar[str | None]

    @property
    def _pass(self) -> Any: ...
    @property
    def param_groups(self) -> list[dict[str, Any]]: ...
    def marks(self) -> dict[str, Any]: ...


def joined(
    wrapper: Wrapped, inner: dict[str, Any], training: dict[torch.Tensor, torch.Tensor]
) -> dict[str, Any]:
    """The optimizer's state_dict with the wrapper's states, its marks and the weights for training."""
    states = {key: dict(value) if isinstance(value, dict) else value for key, value in inner["state"].items()}
    for index, (_, p) in numbered(wrapper):
        saved = wrapper._pass.saved(p)
        if wrapper.training_key is not None and p in training:
            saved[wrapper.training_key] = training[p]
        if saved:
            states.setdefault(index, {}).update(saved)
    marks = wrapper.marks()
    groups = [{**marks, **group} for group in inner["param_groups"]]
    return {**inner, "state": states, "param_groups": groups}


def taken_apart(
    wrapper: Wrapped, state_dict: dict[str, Any]
) -> tuple[dict[torch.Tensor, dict[str, Any]], list[tuple[torch.Tensor, torch.Tensor]], dict[str, Any]]:
    """States of this wrapper, weights for training, and what is left for the optimizer."""
    ours = wrapper._pass.shown_names().keys() | ({wrapper.training_key} if wrapper.training_key else set())
    states = {}
    for key, value in state_dict["state"].items():
        states[key] = value
        if isinstance(value, dict) and ours & set(value):
            rest = {name: x for name, x in value.items() if name not in ours}
            if rest:
                states[key] = rest
            else:
                del states[key]
    own, training = {}, []
    for index, (name, p) in numbered(wrapper, state_dict["param_groups"]):
        saved = state_dict["state"].get(index, {})
        found = wrapper._pass.take_saved(name, p, saved)
        if found:
            own[p] = found
        if wrapper.training_key is not None and wrapper.training_key in saved:
            training.append((p, wrapper._pass.taken(name, wrapper.training_key, p, saved, p.dtype)))
    marks = wrapper.marks()
    groups = [
        {key: value for key, value in group.items() if key not in marks}
        for group in state_dict["param_groups"]
    ]
    return own, training, {**state_dict, "state": states, "param_groups": groups}


def numbered(
    wrapper: Wrapped, saved_groups: list[dict[str, Any]] | None = None
) -> list[tuple[int, tuple[str, torch.Tensor]]]:
    """Parameters with names, under the numbers of torch's state_dict, or those of `saved_groups`."""
    numbers: dict[int, int] = {}
    count = 0
    for i, group in enumerate(wrapper.param_groups):
        saved = saved_groups[i]["params"] if saved_groups and i < len(saved_groups) else []
        for j, p in enumerate(group["params"]):
            numbers.setdefault(id(p), saved[j] if j < len(saved) else count)
            count += 1
    return [(numbers[id(p)], (name, p)) for name, p in wrapper._pass.names()]
