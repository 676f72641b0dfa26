"""Plain torch: any device, any dtype, any strides. It proves the others and serves where none of them can."""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterator, Sequence
from typing import Any, Protocol

import torch

from .. import formats
from ..grad_norm import sum_of_squares
from ..listed_rows import rows_taking_part
from ..partial_sums import PartialSums, Reducing
from ..scale import StepScale
from ..sharding import local
from ..spec import ParamSpec, Stop
from ..state import COUNTERS, index_of
from ..step_rule import StepRule


class Update(Protocol):
    """Updates the tensors of a parameter and its states in place; stops at the sums of a rule that reduces.
    index: places of their elements in the parameter, where a format asks.
    """

    def __call__(
        self, stored: list[torch.Tensor], g: torch.Tensor, index: torch.Tensor | None
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
        for _, steps in self._steps(copies=False):
            _finish(steps)

    def rounds(self) -> Iterator[Stop]:
        """As `Executor.rounds`: all tensors go from stop to stop together."""
        running = self._steps(copies=True)  # nothing is written at the first stop
        while True:
            stop: Stop = []
            for spec, steps in running:
                sums = next(steps, None)
                if sums is not None:
                    stop.append((spec, sums))
            if not stop:
                return
            yield stop

    def _steps(self, copies: bool) -> list[tuple[ParamSpec, Generator[list[PartialSums], None, None]]]:
        assert self._optimizer is not None
        given = [(spec, spec.gradient) for spec in self._specs]
        return [(spec, self._step(self._optimizer, spec, g, copies)) for spec, g in given if g is not None]

    def _following(self, step: Reducing, g: torch.Tensor, sign: float, scaled: torch.Tensor) -> Reducing:
        """A rule's step, whose scaled gradient follows a factor that changes at a stop."""
        factor = self._factor
        while True:
            try:
                sums = next(step)
            except StopIteration as end:
                return end.value  # type: ignore[no-any-return]
            yield sums
            if self._factor != factor:
                factor = self._factor
                torch.mul(g, sign * factor, out=scaled)

    def release(self) -> None:
        self._optimizer = None

    def _step(
        self, optimizer: StepRule, spec: ParamSpec, g: torch.Tensor, copies: bool
    ) -> Generator[list[PartialSums], None, None]:
        group, held = optimizer.param_groups[spec.group], spec.state
        hyper = optimizer.hyper(group, variant=spec.variant)
        if optimizer.reference_takes_shape:
            hyper["shape"] = spec.whole
        step, micro_step = _counters(spec)
        updates = micro_step + 1 >= spec.accumulation_steps
        counters = optimizer.counters(step, micro_step)
        moves = updates and optimizer.outcome != "none" and optimizer.moves(group)
        sign = optimizer.sign(group)

        own, _, *of_states = map(formats.named, spec.formats)

        def update(
            stored: list[torch.Tensor], g: torch.Tensor, index: torch.Tensor | None
        ) -> Generator[list[PartialSums], None, None]:
            of_p, rest = stored[: len(own.arrays)], iter(stored[len(own.arrays) :])
            kept = [(kept_as, list(itertools.islice(rest, len(kept_as.arrays)))) for kept_as in of_states]
            wide = torch.float64 if of_p[0].dtype == torch.float64 else torch.float32
            p = own.load(of_p, index).to(wide)
            states = [kept_as.load(tensors, index).to(wide, copy=copies) for kept_as, tensors in kept]
            scaled = g.to(wide) * (sign * self._factor)
            result = optimizer.reference(p, scaled, *states, **counters, **hyper)
            if isinstance(result, Generator):
                result = yield from self._following(result, g.to(wide), sign, scaled)
            for (kept_as, tensors), numbers in zip(kept, states, strict=True):
                kept_as.store(numbers, tensors, index)
            if moves:
                own.store(result if optimizer.outcome == "assigned" else p - result, of_p, index)

        names = [name for name in spec.state_names if name not in COUNTERS]
        further = len(names) - (len(own.arrays) - 1)  # the parameter's, behind those of states
        stored = [spec.param, *(held[name] for name in (*names[further:], *names[:further]))]
        stored = [local(t) for t in stored]
        index = index_of(stored[0]) if any(kept_as.indexed for kept_as in (own, *of_states)) else None
        if spec.sparse_mode == "rows":
            yield from _update_rows(update, stored, local(g), spec.rows, index)
        elif spec.sparse_mode == "params":
            seen = len(own.arrays), spec.reduces
            yield from _update_rows_and_moments(update, stored, local(g), spec.rows, index, *seen)
        else:
            yield from update(stored, local(g), index)

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
    update: Update,
    stored: list[torch.Tensor],
    g: torch.Tensor,
    known: torch.Tensor | None,
    index: torch.Tensor | None,
) -> Generator[list[PartialSums], None, None]:
    """Of the parameter and its states, those rows that take part in the gradient."""
    rows, values = rows_taking_part(g, known)
    if len(rows) == 0:
        return
    part = [t.detach()[rows] for t in stored]
    yield from update(part, values, None if index is None else index[rows])
    for whole, updated in zip(stored, part, strict=True):
        whole.index_copy_(0, rows, updated)


def _update_rows_and_moments(
    update: Update,
    stored: list[torch.Tensor],
    g: torch.Tensor,
    known: torch.Tensor | None,
    index: torch.Tensor | None,
    arrays: int,
    whole: bool,
) -> Generator[list[PartialSums], None, None]:
    """Of the parameter, in so many arrays, the rows that take part in the gradient, of its states all, the
    others as with a gradient and a parameter of zeros; `whole`: with the parameter as it is.
    """
    rows, values = rows_taking_part(g, known)
    of_p = [t.detach() for t in stored[:arrays]]
    seen = [t.clone() if whole else torch.zeros_like(t).index_copy_(0, rows, t[rows]) for t in of_p]
    spread = torch.zeros_like(of_p[0], dtype=values.dtype).index_copy_(0, rows, values)
    yield from update([*seen, *stored[arrays:]], spread, index)
    for t, updated in zip(of_p, seen, strict=True):
        t.index_copy_(0, rows, updated[rows])


def _counters(spec: ParamSpec) -> tuple[float, float]:
    """The step that is being made, and the gradients taken for it so far."""
    micro_step = spec.state["micro_step"].item() if spec.accumulation_steps > 1 else 0
    return spec.state["step"].item() + 1, micro_step


REFERENCE = Reference()
