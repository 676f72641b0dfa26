"""State of a parameter: made at its first gradient, loaded without a change of dtype."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from .optimizer import FusedOptimizer

# 0-dim float32 tensors: updates made, and gradients taken since the last update; the optimizer says where
COUNTERS = ("step", "micro_step")


def shapes(
    optimizer: FusedOptimizer, group: dict[str, Any], shape: tuple[int, ...]
) -> dict[str, tuple[int, ...]]:
    """The state of a parameter of that shape: what the rule takes, then the counters."""
    counters = COUNTERS if optimizer.cycle(group) > 1 else COUNTERS[:1]
    return {**optimizer.states(group, shape), **dict.fromkeys(counters, ())}


def ensure(optimizer: FusedOptimizer, p: torch.Tensor, group: dict[str, Any]) -> dict[str, Any]:
    """The parameter's state, with a first value for every key that it does not have yet."""
    state: dict[str, Any] = optimizer.state.setdefault(p, {})  # a plain dict may have been assigned
    for name, shape in shapes(optimizer, group, tuple(p.shape)).items():
        if name in COUNTERS:
            device = optimizer.counter_device(p)
            held = state.get(name)
            if held is None:
                state[name] = torch.zeros((), dtype=torch.float32, device=device)
            elif held.device != device:
                state[name] = held.to(device)
        elif name not in state:
            state[name] = optimizer.initial_state(name, p, shape)
    return state


class _Loaded:
    """Carries a value through torch's `load_state_dict`, which casts tensors and takes strings apart."""

    def __init__(self, value: Any) -> None:
        self.value = value


def wrap(state: Mapping[Any, Any]) -> dict[Any, Any]:
    return {
        key: {name: _Loaded(v) for name, v in value.items()} if isinstance(value, Mapping) else _Loaded(value)
        for key, value in state.items()
    }


def unwrap(optimizer: FusedOptimizer) -> None:
    """Unpacks what `wrap` packed: on the parameter's device, in the dtype that the optimizer declares."""
    for key, value in optimizer.state.items():
        if isinstance(value, dict) and isinstance(key, torch.Tensor):
            for name in value:
                value[name] = _unwrapped(optimizer, key, name, value[name])
        elif isinstance(value, _Loaded):
            optimizer.state[key] = value.value


def _unwrapped(optimizer: FusedOptimizer, p: torch.Tensor, name: str, value: Any) -> Any:
    loaded = isinstance(value, _Loaded)
    if loaded:
        value = value.value
    if name in COUNTERS:
        # one tensor for each parameter, whatever a checkpoint shares; older ones hold numbers
        return torch.tensor(float(value), dtype=torch.float32, device=optimizer.counter_device(p))
    if not loaded or not isinstance(value, torch.Tensor):
        return value
    if name in optimizer.state_names:
        return value.to(device=p.device, dtype=optimizer.state_dtype(name, p))
    return value.to(device=p.device)
