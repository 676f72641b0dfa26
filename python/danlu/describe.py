"""A parameter as backends take it, all of it validated, and which of them takes it."""

from __future__ import annotations

import math
import operator
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch

from . import backends, checks, formats, state
from .fake import is_fake
from .sharding import PLAIN, is_sharded, local, placed_for, refuse_pieces, sharded_alike
from .spec import Backend, ParamSpec
from .step_rule import StepRule


class Descriptions:
    """Parameters of an optimizer that nothing changes meanwhile, described and given to backends.

    Of those that look alike the first is validated in full. What it is validated for is in the look, all but
    the marks that frameworks leave on a parameter: those are looked at in each.
    """

    def __init__(self, optimizer: StepRule) -> None:
        self._optimizer = optimizer
        self._known: dict[Hashable, _Known] = {}
        self._of: dict[int, _Known] = {}  # by the parameter's id

    def of(self, group_index: int, name: str, p: torch.Tensor) -> tuple[ParamSpec, Backend]:
        """Raises what `describe` and `choose` do."""
        optimizer = self._optimizer
        look = _look(optimizer, group_index, p)
        known = self._known.get(look)
        if known is None:
            spec = describe(optimizer, group_index, name, p)
            known = _Known(spec, choose(optimizer, spec)[0])
            if look is not None:
                self._known[look] = known
        else:
            group = optimizer.param_groups[group_index]
            refuse_pieces(optimizer, group, name, p)
            variant = optimizer.variant(group, p)
            spec = known.first.like(p, name, variant, optimizer.state.get(p, {}))
        self._of[id(p)] = known
        return spec, known.backend

    def ensure_state(self, spec: ParamSpec) -> None:
        """Gives a parameter described here its state as kernels take it."""
        known, before = self._of[id(spec.param)], list(spec.state.values())
        if known.complete:
            return
        spec.state = state.ensure(self._optimizer, spec.param, self._optimizer.param_groups[spec.group])
        now = list(spec.state.values())
        # then there is nothing to do for others that look alike
        known.complete = len(now) == len(before) and all(map(operator.is_, now, before))


@dataclass
class _Known:
    first: ParamSpec
    backend: Backend
    complete: bool = False  # whether its states were there as kernels take them


def left_alone(optimizer: StepRule, group_index: int, name: str, p: torch.Tensor) -> str | None:
    """Why no step touches the parameter, which needs no gradient and has none; None if one may.

    As quantized weights, integers: what could not be stepped anyway.
    """
    if p.requires_grad and not (optimizer.takes_gradients and checks.is_uninitialized(p)):
        return None
    if optimizer.takes_gradients and p.grad is not None:
        return None
    try:
        _refuse_parameter(optimizer, optimizer.param_groups[group_index], name, p)
    except (TypeError, ValueError) as error:
        return str(error).removeprefix(f"{name}: ")
    return None


def _refuse_parameter(optimizer: StepRule, group: dict[str, Any], name: str, p: torch.Tensor) -> None:
    """Raises if the optimizer cannot step the parameter, whatever its gradient and states."""
    checks.parameter(name, local(p))
    if optimizer.sparse_mode(group) is not None:
        checks.has_rows(name, p)
    refuse_pieces(optimizer, group, name, p)


def describe(optimizer: StepRule, group_index: int, name: str, p: torch.Tensor) -> ParamSpec:
    """Validates a parameter, its gradient and states; states that are not made yet count as declared."""
    group = optimizer.param_groups[group_index]
    shard, held = local(p), optimizer.state.get(p, {})
    g = p.grad if optimizer.takes_gradients else None
    lazy = optimizer.sparse_mode(group)
    _refuse_parameter(optimizer, group, name, p)
    if g is not None:
        if not sharded_alike(p, g):
            raise ValueError(f"{name}: the gradient is not sharded as the parameter is")
        checks.alike_fake(name, "gradient", shard, local(g))
        if lazy is not None and g.layout != torch.strided:
            checks.listed_rows(name, p, g)
            if not is_fake(g):
                checks.row_numbers(name, p, g._indices()[0])
        else:
            checks.gradient(name, shard, local(g))
    try:
        kept = state.tensors(optimizer, group, p)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    lacking = [key for key, its in kept.items() if key not in held and its.value]
    others = [key for key in optimizer.state_names if key in held and key not in kept]
    if lacking and others:
        raise ValueError(
            f"{name}: its state has {others[0]!r}, made with other settings of the group (shape "
            f"{tuple(p.shape)}); with those of now it needs {lacking[0]!r}"
        )
    values = {"": optimizer.param_format(p)}
    for key, its in kept.items():
        if key in held:
            _check_state(name, key, p, its, held[key])
        elif its.value and any(other in held for other in its.format.keys(its.value)):
            raise ValueError(f"{name}: its state lacks {key!r}, without which {its.value!r} cannot be read")
        values[its.value] = its.format
        if key in held and its.format.is_torch:
            values[its.value] = formats.plain(held[key].dtype)
    if is_sharded(p) and any(value.indexed for value in values.values()):
        raise ValueError(f"{name}: a shard does not know the places of its elements, which its format needs")
    counters = state.counters(optimizer, group)
    for key in counters:
        if key in held:
            checks.counter(name, key, held[key])
    own, *others_kept = values.values()
    gradient = formats.plain(p.dtype if g is None else g.dtype)
    return ParamSpec(
        param=p,
        name=name,
        group=group_index,
        rule=optimizer.rule(group, tuple(p.shape)),
        accumulation_steps=optimizer.accumulation_steps(group),
        takes_gradient=optimizer.takes_gradients,
        sharded=is_sharded(p),
        fake=is_fake(shard),
        shape=tuple(shard.shape),
        whole=tuple(p.shape),
        strides=tuple(shard.stride()),
        reduces=optimizer.reduces,
        matrix=_matrix(optimizer, group, p),
        sparse_mode=lazy,
        variant=optimizer.variant(group, p),
        formats=tuple(value.name for value in (own, gradient, *others_kept)),
        state_names=(*kept, *counters),
        state=held,
    )


def _matrix(optimizer: StepRule, group: dict[str, Any], p: torch.Tensor) -> tuple[int, int, int] | None:
    part = tuple(local(p).shape)
    matrix = optimizer.matrix(group, tuple(p.shape), part)
    # a dimension of size 1 that no matrix has is 0 on ranks that have nothing of it
    return matrix if matrix is None or math.prod(matrix) == math.prod(part) else None


def _check_state(name: str, key: str, p: torch.Tensor, kept: state.Kept, value: Any) -> None:
    checks.state(name, key, p, kept.shape, value, None if kept.format.is_torch else kept.dtype)
    checks.alike_fake(name, f"state {key!r}", local(p), local(value))
    if not placed_for(p, kept.reduced, value):
        raise ValueError(f"{name}: state {key!r} is not sharded as the parameter is")


def choose(optimizer: StepRule, spec: ParamSpec) -> tuple[Backend, str]:
    """The backend that takes the parameter, and why; raises if the one asked for cannot reach its device."""
    if spec.fake:
        return backends.REFERENCE, "it is a fake tensor, which has no data"
    device = spec.param.device
    refusals: list[str] = []
    for backend in backends.candidates(optimizer.backend, device):
        refusal = backend.refusal(spec)
        if refusal is None:
            if backend is backends.REFERENCE and optimizer.capturable and device.type != "cpu":
                raise ValueError(
                    f"{spec.name}: capturable=True needs native kernels on {device}; " + "; ".join(refusals)
                )
            return backend, "; ".join(refusals) or backend.reason
        if device.type not in backend.device_types:
            raise ValueError(f"{spec.name}: {refusal}")
        refusals.append(f"not {backend.name}: {refusal}")
    raise AssertionError("the reference refuses nothing")


def _look(optimizer: StepRule, group_index: int, p: torch.Tensor) -> Hashable:
    """All that `describe` and `choose` see of a parameter, but for marks; None if they may see more."""
    g = p.grad if optimizer.takes_gradients else None
    held = optimizer.state.get(p)
    found: list[Hashable] = [group_index, optimizer.param_format(p).name]
    for t in (p,) if g is None else (p, g):
        if type(t) not in PLAIN or t.layout is not torch.strided:
            return None
        found.append((type(t), t.dtype, t.device, t.shape, t.stride(), t.is_neg()))
    for name, t in held.items() if held else ():
        if type(t) is not torch.Tensor or t.layout is not torch.strided:
            return None
        found.append((name, t.dtype, t.device, t.shape, t.stride(), t.is_neg()))
    found += [optimizer.state_format(name, p).name for name in optimizer.state_names]
    return tuple(found)
