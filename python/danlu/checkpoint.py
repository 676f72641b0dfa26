"""What a state_dict holds, looked at as a whole before an optimizer takes any of it."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from . import checks, formats, state
from .fake import is_fake
from .sharding import is_sharded, part_of, placed_for
from .step_rule import StepRule

# hyper-parameters by which optimizers, danlu's and torch's, are told from each other
TELLING = frozenset(
    (
        *("accumulation_steps", "alpha", "always_adapt", "amsgrad", "beta", "beta1", "beta2_cap", "betas"),
        *("bias_correction", "c_coef", "centered", "clip_threshold", "clip_value", "d_coef", "dampening"),
        *("decay_rate", "eps", "eps_mode", "eta", "extra_l2", "kind", "lambd", "momentum", "momentum_decay"),
        *("min_dim_size_to_factor", "nesterov", "preset", "reduce_dims", "relative_step", "rho"),
        *("scale_parameter", "trust_clip", "warmup_init"),
    )
)
# states by which a checkpoint is seen to be another optimizer's, though it has all that is needed, or nothing
TELLING_STATES = ("exp_avg_sq", "momentum_buffer")


class Carried:
    """Carries a parameter's state through torch's `load_state_dict`, which casts tensors and takes strings
    apart.
    """

    def __init__(self, held: Any) -> None:
        self.held = held


def carried(states: Mapping[Any, Any]) -> dict[Any, Carried]:
    return {key: Carried(held) for key, held in states.items()}


def check_settings(optimizer: StepRule, groups: Iterable[Mapping[str, Any]]) -> None:
    """Raises if groups of a state_dict are another optimizer's: they lack hyper-parameters, and have its."""
    current = [*optimizer.param_groups]
    for i, group in enumerate(groups):
        known = {*optimizer.defaults, *optimizer.also_loads, *(current[i] if i < len(current) else ())}
        lacking = [name for name in optimizer.defaults if name not in group]
        foreign = [name for name in group if name in TELLING and name not in known]
        if lacking and foreign:
            raise ValueError(
                f"param_groups[{i}] are another optimizer's: they have {_listed(foreign)} and lack "
                f"{_listed(lacking)} of {type(optimizer).__name__}"
            )


def read(optimizer: StepRule, loaded: Mapping[str, Any]) -> dict[str, Any]:
    """param_groups and state as `optimizer` can take them: of the dtypes and strides that it declares, on its
    parameters' devices. Changes nothing of the optimizer.

    Raises:
        TypeError, ValueError: a state is missing or does not fit; the message names its parameter.
    """
    groups = loaded["param_groups"]
    for group in groups:
        for name, default in optimizer.defaults.items():
            group.setdefault(name, default)
    states = {
        key: value.held if isinstance(value, Carried) else value for key, value in loaded["state"].items()
    }
    result: defaultdict[Any, Any] = defaultdict(dict, states)
    for i, group in enumerate(groups):
        for name, p in zip(_names(i, group), group["params"], strict=True):
            if p in states:
                result[p] = _read_state(optimizer, group, name, p, states[p])
        if _has_its_steps(optimizer, group, states):
            del group["step"]
    return {**loaded, "state": result, "param_groups": groups}


def _names(index: int, group: Mapping[str, Any]) -> list[str]:
    given = group.get("param_names")
    if given and len(given) == len(group["params"]):
        return list(given)
    return [f"param_groups[{index}]['params'][{j}]" for j in range(len(group["params"]))]


def _has_its_steps(optimizer: StepRule, group: Mapping[str, Any], states: Mapping[Any, Any]) -> bool:
    """Whether the group has counted for its parameters, as apex's do."""
    if "step" not in group or "step" in optimizer.defaults:
        return False
    held = [states[p] for p in group["params"] if states.get(p)]
    return bool(held) and all("step" not in its for its in held)


def _read_state(
    optimizer: StepRule, group: Mapping[str, Any], name: str, p: torch.Tensor, held: Any
) -> dict[str, Any]:
    if not isinstance(held, Mapping):
        raise TypeError(f"{name}: the state must be a dict, got {type(held).__name__}")
    try:
        kept = state.tensors(optimizer, dict(group), p)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    own = (*optimizer.state_names, *kept, *state.COUNTERS)
    if "step" not in held and "step" in group and any(key in held for key in optimizer.state_names):
        held = {**held, "step": group["step"]}
    held = _converted(name, p, kept, held)
    _check_names(optimizer, name, kept, own, held)
    found: dict[str, Any] = {}
    for key, value in held.items():
        if key in state.COUNTERS:
            found[key] = counter(name, key, value, optimizer.counter_device(p))
        elif key in kept:
            its = kept[key]
            if its.format.is_torch:
                found[key] = fitted(name, key, p, its.shape, value, its.dtype, its.reduced)
            else:
                found[key] = fitted(name, key, p, its.shape, value, its.dtype, its.reduced, cast=False)
        elif isinstance(value, torch.Tensor):  # a user's, or of a setting that is off
            found[key] = _moved(
                name, key, value, p, optimizer.state_dtype(key, p) if key in own else value.dtype
            )
        else:
            found[key] = value
    return found


def _converted(
    name: str, p: torch.Tensor, kept: Mapping[str, state.Kept], held: Mapping[str, Any]
) -> Mapping[str, Any]:
    """What a checkpoint holds, with states in the formats of the optimizer where it has them in others."""
    result = dict(held)
    for value, its in {its.value: its for its in kept.values() if its.value}.items():
        wanted = its.format
        found = formats.found(value, held)
        if found is None or found is wanted or (found.is_torch and wanted.is_torch):
            continue
        tensors = [result.pop(key) for key in found.keys(value)]
        numbers = found.load(tensors, state.index_of(tensors[0]) if found.indexed else None)
        if wanted.is_torch:
            result[value] = numbers
        else:
            moved = _moved(name, value, numbers, p, torch.float32)
            result.update(state.encoded(wanted, value, p, its.reduced, moved))
    return result


def _check_names(
    optimizer: StepRule,
    name: str,
    kept: Mapping[str, state.Kept],
    own: Iterable[str],
    held: Mapping[str, Any],
) -> None:
    """Raises unless there is all that goes on together, or nothing, so that the parameter starts anew."""
    kind = type(optimizer).__name__
    foreign = [key for key in TELLING_STATES if held.get(key) is not None and key not in own]
    if not foreign and not any(key in held for key in own):
        return
    counters = optimizer.counters(0.0, 0.0)
    values = {key: its.value for key, its in kept.items() if its.value}
    values |= {"step": "step"} if "step" in counters else {}
    needed = [key for key, value in values.items() if value not in optimizer.optional_states]
    lacking = [key for key in needed if key not in held]
    if lacking:
        raise ValueError(
            f"{name}: the checkpoint lacks {_listed(lacking)} that {kind} needs; it has {_listed(held)}"
        )
    if foreign:
        raise ValueError(f"{name}: the checkpoint is another optimizer's: {kind} has no {_listed(foreign)}")


def counter(name: str, key: str, value: Any, device: torch.device) -> torch.Tensor:
    """A tensor for one parameter alone, whatever a checkpoint shares; older ones have numbers.

    Raises:
        TypeError, ValueError: it counts nothing.
    """
    if isinstance(value, torch.Tensor) and is_fake(value):
        return value.detach().clone().to(device, torch.float32)
    return torch.tensor(_count(name, key, value), dtype=torch.float32, device=device)


def _count(name: str, key: str, value: Any) -> float:
    try:
        if isinstance(value, str | bytes) or (isinstance(value, torch.Tensor) and value.is_meta):
            raise TypeError
        number = float(value)
    except Exception:
        got = (
            f"a tensor of shape {tuple(value.shape)} on {value.device}"
            if isinstance(value, torch.Tensor)
            else repr(value)
        )
        raise TypeError(
            f"{name}: state {key!r} must be a number or a tensor of one element, got {got}"
        ) from None
    if not (number >= 0 and math.isfinite(number)):
        raise ValueError(f"{name}: state {key!r} must be finite and at least 0, got {number}")
    return number


def fitted(
    name: str,
    key: str,
    p: torch.Tensor,
    shape: tuple[int, ...],
    value: Any,
    dtype: torch.dtype,
    reduced: tuple[int, ...] = (),
    *,
    cast: bool = True,
) -> torch.Tensor:
    """A state that a rule takes, of that dtype and shape; without a copy where it fits. A plain tensor of a
    DTensor's whole shape is a whole state, of which each rank takes its part. reduced: the dimensions that it
    is reduced over. cast: from any dtype that torch computes in.

    Raises:
        TypeError, ValueError: it does not; `name` is the parameter's.
    """
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: state {key!r} must be a tensor, got {type(value).__name__}")
    if p.is_meta and value.shape != shape:
        raise ValueError(f"{name}: state {key!r} has shape {tuple(value.shape)}, it needs {shape}")
    if not p.is_meta:
        if not cast and value.dtype != dtype:
            raise TypeError(f"{name}: state {key!r} has dtype {value.dtype}, its format needs {dtype}")
        if cast and not value.is_floating_point():
            raise TypeError(
                f"{name}: state {key!r} has dtype {value.dtype}; a real floating-point tensor is needed"
            )
        if is_sharded(p) and not is_sharded(value) and value.shape == shape:
            value = part_of(p, reduced, value)
        value = _moved(name, key, value, p, dtype)
        if value.shape == shape and value.layout == torch.strided:
            value = state.laid_out(p, value)
    if not p.is_meta:
        checks.state(name, key, p, shape, value, None if cast else dtype)
    if not placed_for(p, reduced, value):
        raise ValueError(f"{name}: state {key!r} is not sharded as the parameter is")
    fits: torch.Tensor = value
    return fits


def _moved(name: str, key: str, value: torch.Tensor, p: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if value.is_meta and not p.is_meta:
        raise ValueError(f"{name}: state {key!r} is on the meta device and has no data")
    return value.to(device=p.device, dtype=dtype)


def _listed(names: Iterable[Any]) -> str:
    return ", ".join(map(repr, names)) or "nothing"
