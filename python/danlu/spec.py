"""Records between a plan and its backends: a parameter as they take it, and what a plan needs of them."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import torch

from .layout import Member
from .partial_sums import PartialSums
from .scale import StepScale
from .step_rule import StepRule


@dataclass
class ParamSpec:
    """One parameter as a backend takes it; a DTensor is described by its local shard."""

    param: torch.Tensor
    name: str
    group: int
    rule: str
    accumulation_steps: int  # gradients for one update
    takes_gradient: bool
    sharded: bool
    fake: bool
    shape: tuple[int, ...]
    whole: tuple[int, ...]  # shape of the parameter that this is a shard of, or of itself
    strides: tuple[int, ...]
    reduces: bool  # whether the rule sums over tensors
    matrix: tuple[int, int, int] | None  # batch, rows, columns, where the rule reduces
    sparse_mode: str | None  # what rows without a gradient keep, see `FusedOptimizer.sparse_mode`
    variant: Hashable  # parameters of a group that differ in it have coefficients of their own
    formats: tuple[str, ...]  # parameter, gradient, states, by their names in `formats.FORMATS`
    state_names: tuple[str, ...]
    state: dict[str, Any]
    coefficients_index: int = -1  # the backend's number for group and variant
    member: Member | None = None  # what other ranks know of it, if they have parts of it

    @property
    def gradient(self) -> torch.Tensor | None:
        """None if the parameter takes no part in this step."""
        return self.param.grad if self.takes_gradient else self.param

    @property
    def rows(self) -> torch.Tensor | None:
        """Those that take part in this step of a lazy parameter, where ranks have parts of rows; None: its
        gradient tells.
        """
        return None if self.member is None else self.member.rows

    def like(self, param: torch.Tensor, name: str, variant: Hashable, state: dict[str, Any]) -> ParamSpec:
        """Of another parameter that looks alike; less than `dataclasses.replace`, for plans of thousands."""
        other = object.__new__(ParamSpec)
        other.__dict__.update(self.__dict__, param=param, name=name, variant=variant, state=state)
        return other


# sums of tensors that have come to the same stop
Stop: TypeAlias = list[tuple[ParamSpec, list[PartialSums]]]


class Executor(Protocol):
    """The parameters of a plan that one backend takes on one device. A step calls these in their order."""

    captured: bool  # whether a graph has recorded a step of it

    @property
    def device(self) -> torch.device | None:
        """Where it can read the scale of a step; None: it wants numbers."""
        ...

    @property
    def reads_host(self) -> bool:
        """Whether the host has to know if the step counts; else a device decides."""
        ...

    def refresh(self, optimizer: StepRule) -> bool:
        """Reads and validates what the step needs, writes nothing; False if the plan is out of date."""
        ...

    def gradient_squares(self) -> torch.Tensor | float:
        """The sum of squares of all gradients that `refresh` found, in float64."""
        ...

    def clip_factor(self, grad_scale: torch.Tensor | None) -> torch.Tensor | None:
        """What unscales and clips, float32 on the device, by kernels of its own where all gradients of the
        step are here; None if it has none. grad_scale: float32 there, None for 1.
        """
        ...

    def prepare(self, optimizer: StepRule, scale: StepScale) -> None:
        """Folds coefficients; `scale` multiplies every gradient, beside the sign of its group's maximize."""
        ...

    def run(self) -> None:
        """Advances the counters and updates parameters and states."""
        ...

    def rounds(self) -> Iterator[Stop]:
        """As `run`, but stops where sums of tensors are complete, at most twice. They may be changed in place
        there, values and count; what comes next takes them for those of the whole tensors. Parts of a tensor
        stop equally often, also those without elements. Values are gone when the step ends.

        `prepare` may be called again at the first stop, for what comes behind it; its sums stay as they are.
        Where these are all that a rule takes of the gradient, nothing is written so far, and the step may
        begin again. Later it cannot be repeated.
        """
        ...

    def release(self) -> None:
        """Lets go of what the step held, also after a step that failed."""
        ...


class Backend(Protocol):
    """One way to run a step."""

    name: str
    reason: str  # why a tensor takes it, where nothing faster refused

    @property
    def device_types(self) -> tuple[str, ...]:
        """Of the tensors that it could take; empty for any."""
        ...

    def unavailable(self) -> str | None:
        """Why it cannot run here; None if it can."""
        ...

    def refusal(self, spec: ParamSpec) -> str | None:
        """Why it cannot take this parameter; None if it can."""
        ...

    def executor(self, optimizer: StepRule, specs: Sequence[ParamSpec]) -> Executor: ...
