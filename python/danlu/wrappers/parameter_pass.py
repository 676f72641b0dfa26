"""One pass of the engine over the parameters of another optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from .. import checks
from ..optimizer import FusedOptimizer
from ..plan import named_parameters
from ..state import make_state as make_state


class ParameterPass(FusedOptimizer):
    """A rule with one state of its own over the parameter groups of `optimizer`, which it shares.

    Its backend is the optimizer's, where that is danlu's. It looks at nothing else in the groups: neither lr
    nor maximize nor scaling.

    Subclasses give the rule and in `state_names` the state: of the parameter's shape, float32 or, for float64
    parameters, float64. `step` counts the passes over a parameter.
    """

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

    # Checkpoints: the state under its own name, `step` under a name that the optimizer's states do not have.

    def saved(self, p: torch.Tensor) -> dict[str, Any]:
        """What belongs into a state_dict for `p`."""
        held = self.state.get(p, {})
        return {saved: held[name] for name, saved in self._saved_names().items() if name in held}

    def take_saved(self, name: str, p: torch.Tensor, saved: Mapping[str, Any]) -> dict[str, Any]:
        """What `saved` has become as state of `p`; removes nothing from it.

        Raises:
            TypeError, ValueError: it does not fit; `name` is the parameter's.
        """
        found: dict[str, Any] = {}
        for key, under in self._saved_names().items():
            if under not in saved:
                continue
            value = saved[under]
            if key == "step":
                found[key] = torch.tensor(float(value), dtype=torch.float32, device=self.counter_device(p))
                continue
            if isinstance(value, torch.Tensor):
                value = value.to(device=p.device, dtype=self.state_dtype(key, p))
            checks.state(name, under, p, tuple(p.shape), value)
            found[key] = value
        return found

    def parameters(self) -> Iterable[torch.Tensor]:
        """Each once."""
        return dict.fromkeys(p for group in self.param_groups for p in group["params"])

    def saved_keys(self) -> set[str]:
        return set(self._saved_names().values())

    def names(self) -> list[tuple[str, torch.Tensor]]:
        """Parameters, each once, with their names in messages."""
        return [(name, p) for _, name, p in named_parameters(self)]

    def _saved_names(self) -> dict[str, str]:
        (state,) = self.state_names
        return {state: state, "step": f"{state}_step"}

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        del state["param_groups"]
        return {**state, "_of": self._of, "_hyper": self._hyper}


def innermost(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer that steps, inside all wrappers."""
    while not isinstance(optimizer, FusedOptimizer) and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    assert isinstance(optimizer, torch.optim.Optimizer)
    return optimizer
