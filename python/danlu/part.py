"""Some parameters of an optimizer, stepped by themselves: each when its gradient arrives, say."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch

from .layout import needs_other_ranks
from .locking import one_at_a_time
from .optimizer import FusedOptimizer
from .places import Place, holds, name_at
from .plan import Plan


class Part:
    """Parameters of `optimizer` that step together, with a plan that is kept for them.

    A step looks at these parameters, their states and their groups alone, so that it costs the same whatever
    else the optimizer has. Each parameter becomes what a step of all would make of it; hyper-parameters are
    read from the groups at every step. Parts and the whole may be stepped in any order, by any thread. A
    gradient that is left in place counts again in the next step that sees it.

    It is no `step()`: no hook of steps runs, and schedulers do not see it. What counts are the states' own
    `step` and `micro_step`. Parameters of two parts that share memory are stepped in the order of the parts'
    steps; a counter that they share is not noticed.

    Args:
        optimizer: one of danlu's, or `Lazy` or `LayerAdaptation` around one.
        parameters: some of its own, in any order.

    Raises:
        TypeError: `optimizer` is none of those.
        ValueError: a parameter is not the optimizer's, or a DTensor whose step needs other ranks; or
            `max_grad_norm` is set, whose norm is over all.
    """

    def __init__(self, optimizer: FusedOptimizer, parameters: Iterable[torch.Tensor]) -> None:
        if not isinstance(optimizer, FusedOptimizer):
            raise TypeError(f"optimizer must be a danlu optimizer, got {type(optimizer).__name__}")
        if optimizer.max_grad_norm is not None:
            raise ValueError("max_grad_norm needs all gradients, a part of the parameters has its own alone")
        self._optimizer = optimizer
        self._params = list({id(p): p for p in parameters}.values())
        self._names = [f"parameters[{i}]" for i in range(len(self._params))]
        self._places: list[Place] = []
        self._plan: Plan | None = None
        self._captured: Plan | None = None
        with optimizer._lock:
            self._find()

    @property
    def _lock(self) -> AbstractContextManager[Any]:
        return self._optimizer._lock

    @torch.no_grad()
    def step(self) -> None:
        """Makes one step for every parameter of the part that has a gradient.

        Raises:
            TypeError, ValueError: a tensor cannot be stepped, or a parameter has left the optimizer; the
            message names it. Nothing was changed.
        """
        self._step()

    @one_at_a_time
    def _step(self) -> None:
        optimizer, groups = self._optimizer, self._optimizer.param_groups
        if not all(holds(groups, at, p) for at, p in zip(self._places, self._params, strict=True)):
            optimizer._drop(self._plan)
            self._plan = None
            self._find()
        scaling = optimizer._scaling([groups[i] for i in {i for i, _ in self._places}])
        if optimizer._skips(scaling):
            return
        optimizer._step_by(self, scaling)
        plan = self._plan
        if plan is not None and plan.captured and plan is not self._captured:
            optimizer._drop(plan)  # a graph may outlive the part
            self._captured = plan

    def _new_plan(self) -> Plan:
        groups = self._optimizer.param_groups
        placed = zip(self._places, self._params, strict=True)
        return Plan(self._optimizer, [(at[0], name_at(groups, at), p) for at, p in placed])

    def _find(self) -> None:
        """Where the parameters are, in the order of the groups."""
        optimizer = self._optimizer
        groups, places = optimizer.param_groups, optimizer._places
        found = []
        for name, p in zip(self._names, self._params, strict=True):
            at = places.find(groups, p)
            if at is None:
                raise ValueError(f"{name}: not a parameter of the optimizer (shape {tuple(p.shape)})")
            if needs_other_ranks(optimizer, groups[at[0]], p):
                raise ValueError(f"{name}: its step needs sums of other ranks, which all step together")
            found.append((at, p))
        found.sort(key=lambda item: item[0])
        self._places, self._params = [at for at, _ in found], [p for _, p in found]
        self._names = [name_at(groups, at) for at in self._places]
