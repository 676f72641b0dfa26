"""Where the groups of an optimizer list a parameter, found without a walk over the others."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch

Groups: TypeAlias = list[dict[str, Any]]
Place: TypeAlias = tuple[int, int]  # the group's index, and that in its params


class Places:
    """Remembers them; a parameter that is not where it was is looked for in all groups."""

    def __init__(self) -> None:
        self._by_id: dict[int, Place] = {}  # ids of parameters that may be gone

    def find(self, groups: Groups, p: torch.Tensor) -> Place | None:
        """None if no group lists it."""
        at = self._by_id.get(id(p))
        if at is None or not holds(groups, at, p):
            self._by_id = {}
            for i, group in enumerate(groups):
                for j, other in enumerate(group["params"]):
                    self._by_id.setdefault(id(other), (i, j))
            at = self._by_id.get(id(p))
        return at


def holds(groups: Groups, at: Place, p: torch.Tensor) -> bool:
    i, j = at
    return i < len(groups) and j < len(groups[i]["params"]) and groups[i]["params"][j] is p


def name_at(groups: Groups, at: Place) -> str:
    """The name of a parameter in messages."""
    i, j = at
    names = groups[i].get("param_names")
    return names[j] if names else f"param_groups[{i}]['params'][{j}]"
