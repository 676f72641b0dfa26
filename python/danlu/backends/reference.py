"""Plain torch: any device, any dtype, any strides. It proves the others and serves where none of them can."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from typing import Any, Protocol

import torch

from ..grad_norm import sum_of_squares
from ..listed_rows import rows_taking_part
from ..partial_sums import PartialSums
from ..scale import StepScale
from ..sharding import local
from ..spec import ParamSpec, Stop
from ..state import COUNTERS
from ..step_rule import StepRule


class Update(Protocol):
    """Updates a parameter and its states in place; stops at the sums of a rule that reduces."""

    def __call__(
        self, p: torch.Tensor, g: torch.Tensor, stored: list[torch.Tensor]
    ) -> Generator[list[PartialSums], None, None]: ...


class Reference:
    name = "reference"
    reason = "asked for"
    device_types: tuple[str, ...] = ()  # any

    def unavailable(self) -> None:
        return None

    def refusal(self, spec: ParamSpec) -> None:
        return None

    def executor(self, optimizer: StepRule, specs: Sequence[ParamSpec]) -> ReferenceExecutor | FakeExecutor:
        return FakeExecutor(specs) if specs[0].fake else ReferenceExecutor(specs)


class ReferenceExecutor:
    """One parameter after the other with the optimizer's `reference`: fp32, or fp64 for fp64 parameters."""

    reads_host = True
    device = None
    captured = False

    def __init__(self, specs: Sequence[ParamSpec]) -> None:
        self._specs = specs
        self._factor = 1.0
        self._optimizer: StepRule | None = None

    def refresh(self, optimizer: StepRule) -> bool:
        return True  # the plan looks at every spec of the reference itself

    def gradient_squares(self) -> torch.Tensor | float:
        gradients = [g for g in (spec.gradient for spec in self._specs) if g is not None]
        return sum_of_squares(gradients)

    def clip_factor(self, grad_scale: torch.Tensor | None) -> None:
        return None

    def prepare(self, optimizer: StepRule, scale: StepScale) -> None:
        self._optimizer, self._factor = optimizer, scale.factor
        for spec in self._specs:
            if spec.gradient is not None:
                group = optimizer.param_groups[spec.group]
                optimizer.fold(group, *_counters(spec), variant=spec.variant)  # may raise

    def run(self) -> None:
        for _, steps in self._steps():
            _finish(steps)

    def rounds(self) -> Iterator[Stop]:
        """As `Executor.rounds`: all tensors go from stop to stop together."""
        running = self._steps()
        while True:
            stop: Stop = []
            for spec, steps in running:
                sums = next(steps, None)
                if sums is not None:
                    stop.append((spec, sums))
            if not stop:
                return
            yield stop

    def _steps(self) -> list[tuple[ParamSpec, Generator[list[PartialSums], None, None]]]:
        assert self._optimizer is not None
        given = [(spec, spec.gradient) for spec in self._specs]
        return [(spec, self._step(self._optimizer, spec, g)) for spec, g in given if g is not None]

    def release(self) -> None:
        self._optimizer = None

    def _step(
        self, optimizer: StepRule, spec: ParamSpec, g: torch.Tensor
    ) -> Generator[list[PartialSums], None, None]:
        group, held = optimizer.param_groups[spec.group], spec.state
        hyper = optimizer.hyper(group, variant=spec.variant)
        step, micro_step = _counters(spec)
        updates = micro_step + 1 >= spec.accumulation_steps
        counters = optimizer.counters(step, micro_step)
        moves = updates and optimizer.outcome != "none" and optimizer.moves(group)
        factor = optimizer.sign(group) * self._factor

        def update(
            p: torch.Tensor, g: torch.Tensor, stored: list[torch.Tensor]
        ) -> Generator[list[PartialSums], None, None]:
            wide = torch.float64 if p.dtype == torch.float64 else torch.float32
            states = [s.to(wide) for s in stored]
            result = optimizer.reference(p.to(wide), g.to(wide) * factor, *states, **counters, **hyper)
            if isinstance(result, Generator):
                result = yield from result
            for old, new in zip(stored, states, strict=True):
                if old is not new:
                    old.copy_(new)
            if moves:
                p.copy_(result if optimizer.outcome == "assigned" else p.to(wide) - result)

        p = local(spec.param)
        stored = [local(held[name]) for name in spec.state_names if name not in COUNTERS]
        if spec.sparse_mode == "rows":
            yield from _update_rows(update, p, g, stored)
        elif spec.sparse_mode == "params":
            yield from _update_rows_and_moments(update, p, g, stored, whole=spec.reduces)
        else:
            yield from update(p, local(g), stored)

        if spec.accumulation_steps > 1:
            held["micro_step"].fill_(0 if updates else micro_step + 1)
        if updates:
            held["step"].fill_(step)


class FakeExecutor:
    """Fake tensors: a step makes their state, as every part's, and counts; there are no numbers to change.

    Real parts allocate nothing else that stays, so that estimates of memory see what they shall.
    """

    reads_host = True
    device = None
    captured = False

    def __init__(self, specs: Sequence[ParamSpec]) -> None:
        self._specs = specs

    def refresh(self, optimizer: StepRule) -> bool:
        return True

    def gradient_squares(self) -> torch.Tensor | float:
        return 0.0

    def clip_factor(self, grad_scale: torch.Tensor | None) -> None:
        return None

    def prepare(self, optimizer: StepRule, scale: StepScale) -> None:
        pass

    def run(self) -> None:
        for spec in self._specs:
            if spec.gradient is None:
                continue
            step = spec.state["step"]
            if spec.accumulation_steps == 1:
                step.add_(1)
            else:
                step.add_(spec.state["micro_step"].add_(1).remainder_(spec.accumulation_steps) == 0)

    def rounds(self) -> Iterator[Stop]:
        """There are no sums to stop at."""
        self.run()
        return iter(())

    def release(self) -> None:
        pass


def _finish(steps: Iterator[Any]) -> None:
    for _ in steps:
        pass


def _update_rows(
    update: Update, p: torch.Tensor, g: torch.Tensor, stored: list[torch.Tensor]
) -> Generator[list[PartialSums], None, None]:
    """Of the parameter and its states, those rows that take part in the gradient."""
    rows, values = rows_taking_part(g)
    if len(rows) == 0:
        return
    part = [t.detach()[rows] for t in (p, *stored)]
    yield from update(part[0], values, part[1:])
    for whole, updated in zip((p, *stored), part, strict=True):
        whole.index_copy_(0, rows, updated)


def _update_rows_and_moments(
    update: Update, p: torch.Tensor, g: torch.Tensor, stored: list[torch.Tensor], *, whole: bool
) -> Generator[list[PartialSums], None, None]:
    """Of the parameter the rows that take part in the gradient, of its states all, the others as with a
    gradient and a parameter of zeros; `whole`: with the parameter as it is.
    """
    rows, values = rows_taking_part(g)
    seen = p.detach().clone() if whole else torch.zeros_like(p).index_copy_(0, rows, p.detach()[rows])
    yield from update(seen, torch.zeros_like(p, dtype=values.dtype).index_copy_(0, rows, values), stored)
    p.index_copy_(0, rows, seen[rows])


def _counters(spec: ParamSpec) -> tuple[float, float]:
    """The step that is being made, and the gradients taken for it so far."""
    micro_step = spec.state["micro_step"].item() if spec.accumulation_steps > 1 else 0
    return spec.state["step"].item() + 1, micro_step


REFERENCE = Reference()
