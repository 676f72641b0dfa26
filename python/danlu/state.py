"""State of a parameter: made at its first gradient, and in the order in which kernels take it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from . import checks
from .formats import Format
from .sharding import local, reduced_shape, zeros
from .step_rule import StepRule

# 0-dim float32 tensors: updates made, and gradients taken since the last update; the optimizer says where
COUNTERS = ("step", "micro_step")


class Kept(NamedTuple):
    """One tensor of a state: an array of a value."""

    shape: tuple[int, ...]
    reduced: tuple[int, ...]  # the dimensions that it is reduced over
    format: Format
    array: int
    value: str  # the name of the state; empty for a parameter's further arrays

    @property
    def dtype(self) -> torch.dtype:
        return self.format.arrays[self.array].dtype


def tensors(optimizer: StepRule, group: dict[str, Any], p: torch.Tensor) -> dict[str, Kept]:
    """The state of a parameter by its keys, without counters: what the rule takes in its order, then what of
    the parameter is not in `p`.
    """
    shape = tuple(p.shape)
    kept: dict[str, Kept] = {}
    for name, reduced in optimizer.states(group, shape).items():
        held_as = optimizer.state_format(name, p)
        its_shape = reduced_shape(shape, reduced)
        for i, key in enumerate(held_as.keys(name)):
            kept[key] = Kept(its_shape, reduced, held_as, i, name)
    own = optimizer.param_format(p)
    for i, key in enumerate(own.keys_of_parameter(), 1):
        kept[key] = Kept(shape, (), own, i, "")
    return kept


def counters(optimizer: StepRule, group: dict[str, Any]) -> tuple[str, ...]:
    return COUNTERS if optimizer.accumulation_steps(group) > 1 else COUNTERS[:1]


def index_of(t: torch.Tensor) -> torch.Tensor:
    """The places of a tensor's elements, as torch counts them."""
    return torch.arange(t.numel(), device=t.device).view(t.shape)


def ensure(optimizer: StepRule, p: torch.Tensor, group: dict[str, Any]) -> dict[str, Any]:
    """The parameter's state as kernels take it, with a first value for every key that it does not have."""
    state: dict[str, Any] = optimizer.state.setdefault(p, {})  # a plain dict may have been assigned
    for key, kept in tensors(optimizer, group, p).items():
        if key in state:  # another memory format may have come with the model or a checkpoint
            state[key] = laid_out(p, state[key])
        elif kept.format.is_torch:
            state[key] = optimizer.initial_state(kept.value, p, kept.reduced)
        elif not kept.value:
            state[key] = zeros(p, kept.reduced, kept.dtype)
        else:  # all of its arrays are lacking
            numbers = optimizer.initial_state(kept.value, p, kept.reduced)
            state.update(encoded(kept.format, kept.value, p, kept.reduced, numbers))
    for name in counters(optimizer, group):
        device = optimizer.counter_device(p)
        held = state.get(name)
        if held is None:
            state[name] = _counter(device)
        elif held.device != device:
            state[name] = held.to(device)
    return state


def encoded(
    held_as: Format, name: str, p: torch.Tensor, reduced: tuple[int, ...], numbers: torch.Tensor
) -> dict[str, torch.Tensor]:
    """The tensors that keep a state of `p`, by their keys."""
    made = [zeros(p, reduced, array.dtype) for array in held_as.arrays]
    held_as.store(
        local(numbers), [local(t) for t in made], index_of(local(numbers)) if held_as.indexed else None
    )
    return dict(zip(held_as.keys(name), made, strict=True))


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
