"""Counters and coefficients on the device: for steps that a captured graph replays, and for those of which
the host cannot know whether they count.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import torch

from .. import scalar
from ..spec import ParamSpec
from ..step_rule import StepRule

STORE_PARAMS = 1  # its place in a row


class DeviceCoefficients:
    """A coefficients for each parameter, by some twenty small operations for each group. With `idle`
    another for each behind all these, which stores no parameter.

    The rows come from the same `coefficients` as on the host, on float64 vectors with an element for each
    parameter. Rows, counters and addresses stay where they are from step to step.
    """

    def __init__(
        self,
        checked_names: Callable[[str, dict[str, Any]], object],
        specs: Sequence[ParamSpec],
        stride: int,
        *,
        idle: bool = False,
    ) -> None:
        self._checked_names = checked_names
        self._specs = specs
        device = specs[0].param.device
        self.table = torch.zeros((1 + idle) * len(specs), stride, dtype=torch.float32, device=device)
        self._steps = [spec.state["step"] for spec in specs]
        self._accumulates = any(spec.accumulation_steps > 1 for spec in specs)
        # parameters without a cycle have no micro_step: a number of their own keeps the lists alike
        self._fixed: list[torch.Tensor] = []
        self._micro_steps = [
            spec.state["micro_step"] if spec.accumulation_steps > 1 else self._zero(device) for spec in specs
        ]
        # neighbours that share a row on the host
        self._spans: list[tuple[int, int]] = []
        for _, members in groupby(range(len(specs)), key=lambda i: specs[i].coefficients_index):
            indices = list(members)
            self._spans.append((indices[0], indices[-1] + 1))
        self._step_increments: torch.Tensor | None = None
        self._micro_increments: torch.Tensor | None = None

    @property
    def tables(self) -> list[torch.Tensor]:
        return [self.table, *self._fixed]

    def prepare(self, optimizer: StepRule, found_inf: torch.Tensor | None) -> None:
        """Computes the rows; writes nothing that a user sees."""
        steps = torch.stack(self._steps).double()
        micro_steps = (
            torch.stack(self._micro_steps).double() if self._accumulates else torch.zeros_like(steps)
        )
        updates = torch.ones_like(steps, dtype=torch.bool)
        for begin, end in self._spans:
            spec = self._specs[begin]
            updates[begin:end] = micro_steps[begin:end] + 1 >= spec.accumulation_steps
            columns = self._columns(
                optimizer, spec, steps[begin:end] + 1, micro_steps[begin:end], updates[begin:end]
            )
            self.table[begin:end, : columns.shape[1]].copy_(columns)
        if len(self.table) > len(self._specs):
            rows, idle = self.table.view(2, *steps.shape, -1)
            idle.copy_(rows)
            idle[:, STORE_PARAMS] = 0

        counts = 1.0 if found_inf is None else (found_inf == 0).to(torch.float32)
        self._step_increments = updates.to(torch.float32) * counts
        if self._accumulates:
            self._micro_increments = torch.where(updates, -micro_steps, 1.0).to(torch.float32) * counts

    def advance(self, active: Sequence[bool] | None) -> None:
        """Counts the step that was prepared, for the parameters that have a gradient."""
        assert self._step_increments is not None
        _add(self._steps, self._step_increments, active)
        if self._micro_increments is not None:
            _add(self._micro_steps, self._micro_increments, active)

    def _zero(self, device: torch.device) -> torch.Tensor:
        self._fixed.append(torch.zeros((), device=device))
        return self._fixed[-1]

    def _columns(
        self,
        optimizer: StepRule,
        spec: ParamSpec,
        steps: torch.Tensor,
        micro_steps: torch.Tensor,
        updates: torch.Tensor,
    ) -> torch.Tensor:
        """The rows of one span: the engine's two words, then the rule's coefficients."""
        group = optimizer.param_groups[spec.group]
        values = optimizer.fold(group, steps, micro_steps, steps.device, spec.variant)
        self._checked_names(spec.rule, values)
        store_params = updates & optimizer.moves(group, steps.device)
        columns = [optimizer.sign(group), store_params, *values.values()]
        return torch.stack([_vector(column, steps) for column in columns], 1)


def _vector(value: scalar.Scalar, like: torch.Tensor) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value.double().expand(like.shape)
    return torch.full_like(like, value)  # a captured graph takes no copy from the host


def _add(counters: Sequence[torch.Tensor], increments: torch.Tensor, active: Sequence[bool] | None) -> None:
    pairs = list(zip(counters, increments.unbind(), strict=True))
    if active is not None:
        pairs = [pair for pair, chosen in zip(pairs, active, strict=True) if chosen]
    if pairs:
        torch._foreach_add_([counter for counter, _ in pairs], [increment for _, increment in pairs])
