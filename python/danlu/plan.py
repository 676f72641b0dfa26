"""Which backend takes each parameter, and what is cached between steps."""

from __future__ import annotations

import dataclasses
import itertools
import operator
from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import torch

from . import backends, checks, shared_memory
from .describe import Descriptions, choose, describe, left_alone
from .layout import ALONE, Layout, Share, needs_other_ranks
from .places import name_at
from .scale import Scaling, StepScale
from .sharding import flattened_by, is_sharded, placements, refuse_pieces
from .spec import Backend, Executor, ParamSpec
from .step_rule import StepRule

Named: TypeAlias = tuple[int, str, torch.Tensor]  # group index, name, parameter


class Plan:
    """The parameters of an optimizer, each given to a backend.

    A plan decides, its executors only compare. What they do not recognise (another dtype, a replaced state, a
    first gradient that comes late) makes `step` return False, and the optimizer makes a new plan. Making one
    validates every parameter before anything is written.

    parameters: (group index, name, parameter) of those that it is for, each once; None for all. layout: what
    ranks exchange; tensors whose sums they do, or whose squares are summed over other groups, have executors
    of their own.
    """

    def __init__(
        self,
        optimizer: StepRule,
        parameters: Iterable[Named] | None = None,
        layout: Layout | None = None,
    ) -> None:
        self.last_step = 0  # that took it, as the optimizer counts them
        self._params: list[list[torch.Tensor]] = []
        if parameters is None:
            self._params = [list(group["params"]) for group in optimizer.param_groups]
            parameters = named_parameters(optimizer)
        self._counters_on_device = optimizer.counters_on_device
        self._waiting: list[torch.Tensor] = []  # no gradient so far
        self._left_alone: list[tuple[torch.Tensor, Hashable]] = []  # and what they looked like
        described: list[ParamSpec] = []
        chosen: list[Backend] = []
        descriptions = Descriptions(optimizer)
        for group, name, p in parameters:
            if optimizer.takes_gradients and p.grad is None and p not in optimizer.state:
                self._waiting.append(p)
                continue
            if left_alone(optimizer, group, name, p):
                self._left_alone.append((p, _look(p)))
                continue
            spec, backend = descriptions.of(group, name, p)
            spec.member = None if layout is None else layout.of.get(id(p))
            if spec.member is None and needs_other_ranks(optimizer, optimizer.param_groups[group], p):
                if optimizer.takes_gradients and p.grad is None:
                    self._waiting.append(p)  # was trained before
                    continue
                raise ValueError(f"{name}: its step needs other ranks, and it requires no gradient")
            described.append(spec)
            chosen.append(backend)
        self._stepped = [spec.param for spec in described]
        # what native lists compare is local
        placed = self._stepped if optimizer.takes_gradients else []
        self._placements = [(p, placements(p)) for p in placed if is_sharded(p)]
        in_order = [backend is backends.REFERENCE for backend in chosen]
        turns = shared_memory.turns(described, in_order)
        taken: dict[tuple[int, Backend, torch.device, Share], list[ParamSpec]] = {}
        for turn, backend, spec in zip(turns, chosen, described, strict=True):
            descriptions.ensure_state(spec)
            share = ALONE if layout is None else layout.share(spec.param)
            taken.setdefault((turn, backend, spec.param.device, share), []).append(spec)
        self._slow = list(itertools.compress(described, in_order))
        in_turn = sorted(taken.items(), key=lambda item: item[0][0])
        self._executors = [backend.executor(optimizer, specs) for (_, backend, *_), specs in in_turn]
        self.shares = [share for (*_, share), _ in in_turn]  # of each executor

    @property
    def captured(self) -> bool:
        """Whether a graph has recorded a step, whose replays read the tables of its executors."""
        return any(executor.captured for executor in self._executors)

    @property
    def executors(self) -> Sequence[Executor]:
        return self._executors

    def begin(self, optimizer: StepRule) -> bool:
        """Reads what a step needs; False if the plan is out of date. Nothing is written.

        Raises for a tensor that cannot be stepped. After True `step`, or who steps instead, has to `release`.
        """
        try:
            current = self._refresh(optimizer)
        except BaseException:
            self.release()
            raise
        if not current:
            self.release()
        return current

    def step(self, optimizer: StepRule, scaling: Scaling) -> None:
        """Makes the step that has begun.

        Raises for a hyper-parameter that is out of its range, with nothing written.
        """
        try:
            if any(executor.reads_host for executor in self._executors) and scaling.skips():
                return
            self.prepare(optimizer, scaling)
            for executor in self._executors:
                executor.run()
        finally:
            self.release()

    def prepare(
        self,
        optimizer: StepRule,
        scaling: Scaling,
        squares: Sequence[torch.Tensor | float] | None = None,
        found_inf: torch.Tensor | None = None,
    ) -> None:
        """Folds the coefficients of the step that has begun, again if it has to be.

        squares: whose sum is that of all gradients of all ranks; None: there are no others. found_inf: not 0
        where ranks have agreed to change nothing; None: as this one knows.
        """
        for executor, scale in zip(self._executors, self._scales(scaling, squares), strict=True):
            if found_inf is not None:
                scale = dataclasses.replace(scale, found_inf=found_inf)
            executor.prepare(optimizer, scale)

    def release(self) -> None:
        """Lets go of what a step has read."""
        for executor in self._executors:
            executor.release()

    def has_states(self, optimizer: StepRule) -> bool:
        """Whether its parameters are still the optimizer's, which may have put others in their place."""
        return all(p in optimizer.state for p in self._stepped)

    def lists(self, groups: list[dict[str, Any]]) -> bool:
        """Whether it was made for all parameters, these in these groups."""
        if len(groups) != len(self._params):
            return False
        for group, params in zip(groups, self._params, strict=True):
            current = group["params"]
            if len(current) != len(params) or not all(map(operator.is_, current, params)):
                return False
        return True

    def _refresh(self, optimizer: StepRule) -> bool:
        if self._counters_on_device != optimizer.counters_on_device:
            return False
        if any(p.grad is not None for p in self._waiting):
            return False
        if any(_look(p) != look for p, look in self._left_alone):
            return False
        if any(p.grad is not None and placements(p.grad) != own for p, own in self._placements):
            return False
        return self._slow_still_slow(optimizer) and all(
            executor.refresh(optimizer) for executor in self._executors
        )

    def _scales(
        self, scaling: Scaling, squares: Sequence[torch.Tensor | float] | None = None
    ) -> list[StepScale]:
        """What each executor is told; those on a device read it there, without waiting."""
        clip = None
        if squares is None:
            clip = self._clip_factor(scaling) if scaling.clips else None
            by_executor = scaling.clips and clip is None
            squares = [executor.gradient_squares() for executor in self._executors if by_executor]
        factor: float | None = None  # read once, where a number is wanted
        scales = []
        for executor in self._executors:
            device = executor.device
            if device is None or (executor.reads_host and not scaling.clips):
                factor = scaling.factor(squares) if factor is None else factor
                scales.append(StepScale(factor))
                continue
            own = scaling.factor_on(device, squares) if clip is None else clip
            found_inf = None if executor.reads_host else scaling.found_inf_on(device)
            scales.append(StepScale(clip=own, found_inf=found_inf))
        return scales

    def _clip_factor(self, scaling: Scaling) -> torch.Tensor | None:
        """Of the only executor, which has all gradients, if it has kernels for it."""
        if len(self._executors) > 1 or not self._executors:
            return None
        (executor,) = self._executors
        device = executor.device
        return None if device is None else executor.clip_factor(scaling.grad_scale_on(device))

    def _slow_still_slow(self, optimizer: StepRule) -> bool:
        """Validates again what the reference takes, and looks whether something faster can take it by now."""
        for spec in self._slow:
            held = optimizer.state.get(spec.param)
            if held is not spec.state or any(name not in held for name in spec.state_names):
                return False
            if spec.gradient is None:
                continue
            now = describe(optimizer, spec.group, spec.name, spec.param)
            if choose(optimizer, now)[0] is not backends.REFERENCE:
                return False
            if (now.accumulation_steps, now.sparse_mode, now.state_names) != (
                spec.accumulation_steps,
                spec.sparse_mode,
                spec.state_names,
            ):
                return False
        shared_memory.turns(self._slow, [True] * len(self._slow))  # raises
        return True


def named_parameters(optimizer: StepRule, first: int = 0) -> Iterator[Named]:
    """Each parameter once; of groups from the first on."""
    seen: set[int] = set()
    for index, group in enumerate(optimizer.param_groups[first:], first):
        for j, p in enumerate(group["params"]):
            if id(p) not in seen:
                seen.add(id(p))
                yield index, name_at(optimizer.param_groups, (index, j)), p


def refuse_flattened(optimizer: StepRule, first: int = 0) -> None:
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
