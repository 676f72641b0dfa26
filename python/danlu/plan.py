"""Which backend takes each parameter, and what is cached between steps."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from . import backends, checks, shared_memory, state
from .fake import is_fake
from .gradient_scale import GradientScale
from .sharding import flattened_by, is_sharded, local, refuse_pieces, sharded_alike

if TYPE_CHECKING:
    from .optimizer import FusedOptimizer


@dataclass
class Entry:
    """One parameter as a backend takes it; a DTensor is described by its local shard."""

    param: torch.Tensor
    name: str
    group: int
    rule: str
    cycle: int  # gradients for one update
    takes_gradient: bool
    sharded: bool
    fake: bool
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    reduces: bool  # whether the rule sums over tensors
    matrix: tuple[int, int, int] | None  # batch, rows, columns, where the rule reduces
    lazy: str | None  # what rows without a gradient keep, see `FusedOptimizer.laziness`
    variant: Hashable  # parameters of a group that differ in it have coefficients of their own
    dtypes: tuple[str, ...]  # parameter, gradient, states
    state_names: tuple[str, ...]
    state: dict[str, Any]
    row_set: int = -1  # the backend's number for group and variant

    @property
    def gradient(self) -> torch.Tensor | None:
        """None if the parameter takes no part in this step."""
        return self.param.grad if self.takes_gradient else self.param


class Plan:
    """The parameters of an optimizer, each given to a backend.

    A plan decides, its parts only compare. What they do not recognise (another dtype, a replaced state, a
    first gradient that comes late) makes `step` return False, and the optimizer makes a new plan. Making one
    validates every parameter before anything is written.
    """

    def __init__(self, optimizer: FusedOptimizer) -> None:
        self.last_step = 0  # that took it, as the optimizer counts them
        self._params = [list(group["params"]) for group in optimizer.param_groups]
        self._waiting: list[torch.Tensor] = []  # no gradient so far
        self._left_alone: list[tuple[torch.Tensor, Hashable]] = []  # and what they looked like
        described: list[Entry] = []
        chosen: list[backends.Backend] = []
        for group, name, p in named_parameters(optimizer):
            if optimizer.takes_gradients and p.grad is None and p not in optimizer.state:
                self._waiting.append(p)
                continue
            if left_alone(optimizer, group, name, p):
                self._left_alone.append((p, _look(p)))
                continue
            entry = describe(optimizer, group, name, p)
            described.append(entry)
            chosen.append(choose(optimizer, entry)[0])
        self._stepped = [entry.param for entry in described]
        in_order = [backend is backends.REFERENCE for backend in chosen]
        turns = shared_memory.turns(described, in_order)
        taken: dict[tuple[int, backends.Backend, torch.device], list[Entry]] = {}
        for turn, backend, entry in zip(turns, chosen, described, strict=True):
            entry.state = state.ensure(optimizer, entry.param, optimizer.param_groups[entry.group])
            taken.setdefault((turn, backend, entry.param.device), []).append(entry)
        self._slow = list(itertools.compress(described, in_order))
        in_turn = sorted(taken.items(), key=lambda item: item[0][0])
        self._parts = [backend.part(optimizer, entries) for (_, backend, _), entries in in_turn]

    @property
    def captured(self) -> bool:
        """Whether a graph has recorded a step, whose replays read the tables of the parts."""
        return any(part.captured for part in self._parts)

    def step(self, optimizer: FusedOptimizer, scale: GradientScale) -> bool:
        """Makes one step; False, with nothing written, if the plan is out of date.

        Raises for a tensor or a hyper-parameter that cannot be stepped, with nothing written.
        """
        try:
            if not self._gather(optimizer):
                return False
            scale.parts = self._parts
            if any(part.reads_host for part in self._parts) and scale.skips():
                return True
            for part in self._parts:
                part.prepare(optimizer, scale)
            for part in self._parts:
                part.run()
            return True
        finally:
            for part in self._parts:
                part.release()

    def has_states(self, optimizer: FusedOptimizer) -> bool:
        """Whether its parameters are still the optimizer's, which may have put others in their place."""
        return all(p in optimizer.state for p in self._stepped)

    def lists(self, groups: list[dict[str, Any]]) -> bool:
        """Whether it was made for these parameters in these groups."""
        if len(groups) != len(self._params):
            return False
        for group, params in zip(groups, self._params, strict=True):
            current = group["params"]
            if len(current) != len(params) or not all(map(operator.is_, current, params)):
                return False
        return True

    def _gather(self, optimizer: FusedOptimizer) -> bool:
        if any(p.grad is not None for p in self._waiting):
            return False
        if any(_look(p) != look for p, look in self._left_alone):
            return False
        return self._slow_still_slow(optimizer) and all(part.gather(optimizer) for part in self._parts)

    def _slow_still_slow(self, optimizer: FusedOptimizer) -> bool:
        """Validates again what the reference takes, and looks whether something faster can take it by now."""
        for entry in self._slow:
            held = optimizer.state.get(entry.param)
            if held is not entry.state or any(name not in held for name in entry.state_names):
                return False
            if entry.gradient is None:
                continue
            now = describe(optimizer, entry.group, entry.name, entry.param)
            if choose(optimizer, now)[0] is not backends.REFERENCE:
                return False
            if (now.cycle, now.lazy, now.state_names) != (entry.cycle, entry.lazy, entry.state_names):
                return False
        shared_memory.turns(self._slow, [True] * len(self._slow))  # raises
        return True


def named_parameters(optimizer: FusedOptimizer, first: int = 0) -> Iterator[tuple[int, str, torch.Tensor]]:
    """(group index, name, parameter), each parameter once; of groups from the first on."""
    seen: set[int] = set()
    for index, group in enumerate(optimizer.param_groups[first:], first):
        names = group.get("param_names")
        for j, p in enumerate(group["params"]):
            if id(p) not in seen:
                seen.add(id(p))
                yield index, names[j] if names else f"param_groups[{index}]['params'][{j}]", p


def left_alone(optimizer: FusedOptimizer, group_index: int, name: str, p: torch.Tensor) -> str | None:
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


def refuse_flattened(optimizer: FusedOptimizer, first: int = 0) -> None:
    """Raises if a parameter of groups from the first on is marked as a piece, and whole ones are needed."""
    for index, name, p in named_parameters(optimizer, first):
        if p.requires_grad and flattened_by(p) is not None:
            refuse_pieces(optimizer, optimizer.param_groups[index], name, p)


def _look(p: torch.Tensor) -> Hashable:
    """What may end that a parameter is left alone."""
    if checks.is_uninitialized(p):
        return None
    strides = p.stride() if p.layout == torch.strided else None
    return p.requires_grad, p.grad is None, p.dtype, p.device, p.layout, p.shape, strides


def _refuse_parameter(optimizer: FusedOptimizer, group: dict[str, Any], name: str, p: torch.Tensor) -> None:
    """Raises if the optimizer cannot step the parameter, whatever its gradient and states."""
    checks.parameter(name, local(p))
    if optimizer.laziness(group) is not None:
        checks.has_rows(name, p)
    refuse_pieces(optimizer, group, name, p)


def describe(optimizer: FusedOptimizer, group_index: int, name: str, p: torch.Tensor) -> Entry:
    """Validates a parameter, its gradient and states; states that are not made yet count as declared."""
    group = optimizer.param_groups[group_index]
    shard, held = local(p), optimizer.state.get(p, {})
    g = p.grad if optimizer.takes_gradients else None
    lazy = optimizer.laziness(group)
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
        shapes = state.shapes(optimizer, group, tuple(p.shape))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    lacking = [key for key in shapes if key not in held and key not in state.COUNTERS]
    others = [key for key in optimizer.state_names if key in held and key not in shapes]
    if lacking and others:
        raise ValueError(
            f"{name}: its state has {others[0]!r}, made with other settings of the group (shape "
            f"{tuple(p.shape)}); with those of now it needs {lacking[0]!r}"
        )
    dtypes = [p.dtype, p.dtype if g is None else g.dtype]
    for key, shape in shapes.items():
        if key in state.COUNTERS:
            if key in held:
                checks.counter(name, key, held[key])
            continue
        if key in held:
            checks.state(name, key, p, shape, held[key])
            checks.alike_fake(name, f"state {key!r}", shard, local(held[key]))
            if not sharded_alike(p, held[key]):
                raise ValueError(f"{name}: state {key!r} is not sharded as the parameter is")
        dtypes.append(held[key].dtype if key in held else optimizer.state_dtype(key, p))
    return Entry(
        param=p,
        name=name,
        group=group_index,
        rule=optimizer.rule(group, tuple(shard.shape)),
        cycle=optimizer.cycle(group),
        takes_gradient=optimizer.takes_gradients,
        sharded=is_sharded(p),
        fake=is_fake(shard),
        shape=tuple(shard.shape),
        strides=tuple(shard.stride()),
        reduces=optimizer.reduces,
        matrix=optimizer.matrix(group, tuple(shard.shape)),
        lazy=lazy,
        variant=optimizer.variant(group, p),
        dtypes=tuple(str(dtype).removeprefix("torch.") for dtype in dtypes),
        state_names=tuple(shapes),
        state=held,
    )


def choose(optimizer: FusedOptimizer, entry: Entry) -> tuple[backends.Backend, str]:
    """The backend that takes the parameter, and why; raises if the one asked for cannot reach its device."""
    if entry.fake:
        return backends.REFERENCE, "it is a fake tensor, which has no data"
    device = entry.param.device
    refusals: list[str] = []
    for backend in backends.candidates(optimizer.backend, device):
        refusal = backend.refusal(entry)
        if refusal is None:
            if backend is backends.REFERENCE and optimizer.capturable and device.type != "cpu":
                raise ValueError(
                    f"{entry.name}: capturable=True needs native kernels on {device}; " + "; ".join(refusals)
                )
            return backend, "; ".join(refusals) or backend.reason
        if device.type not in backend.device_types:
            raise ValueError(f"{entry.name}: {refusal}")
        refusals.append(f"not {backend.name}: {refusal}")
    raise AssertionError("the reference refuses nothing")
