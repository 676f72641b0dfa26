"""State of a parameter: made at its first gradient, and in the order in which kernels take it."""

from __future__ import annotations

from typing import Any

import torch

from . import checks
from .sharding import local
from .step_rule import StepRule

# 0-dim float32 tensors: updates made, and gradients taken since the last update; the optimizer says where
COUNTERS = ("step", "micro_step")


def shapes(optimizer: StepRule, group: dict[str, Any], shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """The state of a parameter of that shape: what the rule takes, then the counters."""
    counters = COUNTERS if optimizer.accumulation_steps(group) > 1 else COUNTERS[:1]
    return {**optimizer.states(group, shape), **dict.fromkeys(counters, ())}


def ensure(optimizer: StepRule, p: torch.Tensor, group: dict[str, Any]) -> dict[str, Any]:
    """The parameter's state as kernels take it, with a first value for every key that it does not have."""
    state: dict[str, Any] = optimizer.state.setdefault(p, {})  # a plain dict may have been assigned
    for name, shape in shapes(optimizer, group, tuple(p.shape)).items():
        if name in COUNTERS:
            device = optimizer.counter_device(p)
            held = state.get(name)
            if held is None:
                state[name] = _counter(device)
            elif held.device != device:
                state[name] = held.to(device)
        elif name not in state:
            state[name] = optimizer.initial_state(name, p, shape)
        else:  # another memory format may have come with the model or a checkpoint
            state[name] = laid_out(p, state[name])
    return state


def _counter(device: torch.device) -> torch.Tensor:
    if device.type == "cpu":
        # of a number, since a fake tensor knows its value then: wrappers read what they have counted
        return torch.tensor(0.0, dtype=torch.float32, device=device)
    return torch.zeros((), dtype=torch.float32, device=device)  # no copy, which a capture would not take


def laid_out(p: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """A state with its elements in the order in which kernels take them: that of a dense `p`, or contiguous
    if it has another shape. A copy only where it is in another order.
    """
    own, its = local(p), local(value)
    if its.shape != own.shape:
        fits, like = its.is_contiguous(), value
    else:
        fits, like = same_strides(own, its) or not checks.is_dense(own), p
    if fits and not its.is_neg():
        return value
    kept = torch.preserve_format if like is p else torch.contiguous_format
    room = torch.empty_like(like, dtype=value.dtype, requires_grad=False, memory_format=kept)
    return room.copy_(value)


def same_strides(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors of one shape put their elements in the same order."""
    if a.stride() == b.stride() or a.numel() == 0:
        return True
    dims = zip(a.shape, a.stride(), b.stride(), strict=True)
    return all(size == 1 or stride == other for size, stride, other in dims)


def as_counters(optimizer: StepRule) -> None:
    """Makes tensors of counters that are numbers, as older pickles have them."""
    for p, held in optimizer.state.items():
        if isinstance(held, dict) and isinstance(p, torch.Tensor):
            for name in COUNTERS:
                if name in held:
                    number, device = float(held[name]), optimizer.counter_device(p)
                    held[name] = torch.tensor(number, dtype=torch.float32, device=device)
