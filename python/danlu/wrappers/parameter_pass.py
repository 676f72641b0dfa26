"""One pass of the engine over the parameters of another optimizer."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from .. import checkpoint
from ..optimizer import FusedOptimizer
from ..plan import named_parameters
from .order import Nested

# groups that `start` remembers beside those of now
MOST_STARTED = 64


class ParameterPass(FusedOptimizer):
    """A rule with one state of its own over the parameter groups of `optimizer`, which it shares.

    Its backend is the optimizer's, where that is danlu's. It looks at nothing else in the groups: neither lr
    nor maximize nor scaling. Hooks that users give to all optimizers do not see it.

    Subclasses give the rule and in `state_names` the state: of the parameter's shape, float32 or, for float64
    parameters, float64. `step` counts the passes over a parameter.
    """

    # the parameters of groups, by the dict's id, when `start` last looked; some step one group at a time
    _started: dict[int, list[torch.Tensor]] | None = None

    def __init__(self, optimizer: torch.optim.Optimizer, **hyper: Any) -> None:
        self._of = optimizer
        self._hyper = hyper
        stepping = innermost(optimizer)
        capturable = any(group.get("capturable") for group in optimizer.param_groups)
        super().__init__(
            [{"params": []}],  # torch wants a group
            {},
            backend=getattr(stepping, "backend", "auto"),
            capturable=getattr(stepping, "capturable", capturable),
        )
        self.defaults = {}

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self._of.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        pass

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        pass

    def hyper(self, *_: Any, **__: Any) -> dict[str, Any]:
        return self._hyper

    def sign(self, group: dict[str, Any]) -> float:
        return 1.0

    def moves(self, group: dict[str, Any], device: torch.device | None = None) -> bool:
        return True

    @torch.no_grad()
    def run(self) -> None:
        """Makes the pass."""
        self._step()

    def start(self) -> None:
        """Gives every parameter its state, before the optimizer moves any.

        Raises:
            TypeError, ValueError: the pass cannot take a parameter or the state it has; nothing was made.
        """
        groups = self.param_groups
        started = self._started or {}
        if all(_alike(group["params"], started.get(id(group))) for group in groups):
            return
        self.make_state()
        if len(started) > len(groups) + MOST_STARTED:  # of groups that are gone
            started = {}
        self._started = {**started, **{id(group): list(group["params"]) for group in groups}}

    def look_again(self) -> None:
        """Lets the next `start` look at every parameter and its state."""
        self._started = None

    def replace_state(self, state: Mapping[torch.Tensor, dict[str, Any]]) -> None:
        self.state.clear()
        self.state.update(state)
        self.look_again()
        self._drop_plan()

    # Checkpoints: the state under its own name, `step` under a name that the optimizer's states do not have.

    def shown_names(self) -> dict[str, str]:
        """Names in `state`, by those in a state_dict."""
        (state,) = self.state_names
        return {state: state, f"{state}_step": "step"}

    def saved(self, p: torch.Tensor) -> dict[str, Any]:
        """What belongs into a state_dict for `p`."""
        held = self.state.get(p, {})
        return {shown: held[name] for shown, name in self.shown_names().items() if name in held}

    def take_saved(self, name: str, p: torch.Tensor, saved: Mapping[str, Any]) -> dict[str, Any]:
        """What `saved` has become as state of `p`; removes nothing from it.

        Raises:
            TypeError, ValueError: it does not fit; `name` is the parameter's.
        """
        names = self.shown_names()
        missing = [shown for shown in names if shown not in saved]
        if len(missing) == len(names):
            return {}
        if missing:
            raise ValueError(f"{name}: the state_dict has no {missing[0]!r}, which goes with {list(names)}")
        return {key: self.taken(name, shown, p, saved) for shown, key in names.items()}

    def taken(
        self,
        name: str,
        shown: str,
        p: torch.Tensor,
        saved: Mapping[str, Any],
        dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """One value of a state_dict as this pass keeps it, or in `dtype`; never the same memory if a number.

        Raises:
            TypeError, ValueError: it does not fit.
        """
        value, key = saved[shown], self.shown_names().get(shown)
        if key == "step":
            return checkpoint.counter(name, shown, value, self.counter_device(p))
        dtype = dtype or self.state_dtype(key or shown, p)
        return checkpoint.fitted(name, shown, p, tuple(p.shape), value, dtype)

    def parameters(self) -> Iterable[torch.Tensor]:
        """Each once."""
        return dict.fromkeys(p for group in self.param_groups for p in group["params"])

    def names(self) -> list[tuple[str, torch.Tensor]]:
        """Parameters, each once, with their names in messages."""
        return [(name, p) for _, name, p in named_parameters(self)]

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        del state["param_groups"]
        return {**state, "_of": self._of, "_hyper": self._hyper}


def innermost(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer that steps, inside all wrappers."""
    while isinstance(optimizer, Nested) and not isinstance(optimizer, FusedOptimizer):
        optimizer = optimizer._inner
    assert isinstance(optimizer, torch.optim.Optimizer)
    return optimizer


def _alike(some: list[torch.Tensor], others: list[torch.Tensor] | None) -> bool:
    return others is not None and len(some) == len(others) and all(map(operator.is_, some, others))
