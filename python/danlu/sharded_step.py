"""A step whose tensors have parts on other ranks: all agree before any writes, then go from stop to stop."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

import torch

from .agreement import Agreement, Verdict
from .capture import is_capturing
from .exchange import Request, exchange
from .layout import Layout
from .partial_sums import PartialSums
from .plan import Plan
from .scale import Scaling
from .spec import Executor, Stop
from .step_rule import StepRule

# an executor, and what is left of its `rounds`
Running: TypeAlias = tuple[Executor, Iterator[Stop]]
# a norm of gradients whose squares are far below fp32's largest number
LARGEST = 2.0**60


def step(optimizer: StepRule, layout: Layout, scaling: Scaling, begin: Callable[[], Plan]) -> None:
    """Makes a step with all ranks. begin: gives a plan whose step has begun, or raises.

    Raises on every rank, with nothing written on any: what was wrong on this one, else RuntimeError. Where
    counters are on a device no rank waits for it: the others raise in their next step.
    """
    if is_capturing(layout.device):
        raise RuntimeError("danlu: a step that needs other ranks cannot be captured in a CUDA graph")
    if layout.late is not None:
        late, layout.late = layout.late, None
        try:
            _raise_if_refused(late.verdict(), None)
        except RuntimeError:
            layout.put_summands_back()
            raise
    with layout.settled_gradients():
        _step(optimizer, layout, scaling, begin)


def _step(optimizer: StepRule, layout: Layout, scaling: Scaling, begin: Callable[[], Plan]) -> None:
    _compare(layout, scaling)
    _find_rows(layout)
    plan, error = None, None
    try:
        plan = begin()
        plan.prepare(optimizer, scaling, [])  # may raise
    except Exception as wrong:
        error = wrong
    try:
        _Step(optimizer, layout, scaling, plan if error is None else None, error).run()
    finally:
        if plan is not None:
            plan.release()


def _compare(layout: Layout, scaling: Scaling) -> None:
    """Once: buffers of other sizes would be added up without an error, or never."""
    if layout.agreed:
        return
    word = Agreement(layout.groups(scaling), layout.device, layout.described())
    exchange([word.request])
    if not word.verdict().same:
        raise ValueError(
            "the optimizers of the ranks differ: in shapes, placements or the order of parameters, or in "
            "settings of their groups"
        )
    layout.agreed = True


def _raise_if_refused(verdict: Verdict, absent: list[str] | None) -> None:
    """absent: parameters without a gradient, where this step is still looked at."""
    if verdict.failed:
        raise RuntimeError("danlu: the step failed on another rank; nothing was changed on any")
    if not verdict.same:
        here = "" if absent is None else f" On this one: {', '.join(absent) or 'none'}"
        raise RuntimeError(
            f"danlu: gradients are missing on some ranks only, or summands; nothing was changed.{here}"
        )


def _find_rows(layout: Layout) -> None:
    """A row takes part on all ranks that have a part of it if it does on one."""
    flags = [member.flags() for member in layout.lazy]
    exchange(flags)
    for member, flag in zip(layout.lazy, flags, strict=True):
        member.rows = flag.values.nonzero()[:, 0].to(member.param.device)


class _Step:
    """From what this rank has validated to the end; without a plan it joins with zeros, and then raises."""

    def __init__(
        self,
        optimizer: StepRule,
        layout: Layout,
        scaling: Scaling,
        plan: Plan | None,
        error: Exception | None,
    ) -> None:
        self._optimizer, self._layout, self._scaling = optimizer, layout, scaling
        self._plan, self._error = plan, error
        self._parts = [] if plan is None else list(zip(plan.executors, plan.shares, strict=True))
        self._agreed = False
        self._norm_squares: Sequence[torch.Tensor] = ()
        self._word = Agreement(
            layout.groups(scaling),
            layout.device,
            layout.mask(),
            failed=error is not None,
            found_inf=scaling.found_inf_on(layout.device),
        )

    def run(self) -> None:
        running: list[Running] = []
        for number in range(self._layout.rounds):
            running += self._begin(number)
            found = _at_stop(running)
            if self._agreed:
                exchange(self._requests(number, found))
            elif not self._first_round(found):
                return
            elif self._refused():
                self._leave_out_those_on_the_host()
                running = [(executor, steps) for executor, steps in running if not executor.reads_host]
            elif self._layout.riding and self._too_large():
                running = self._begin(number)
                found = _at_stop(running)
                exchange(self._requests(number, found))
            elif self._layout.riding:
                self._clip(found)
            for member in self._layout.exchanging:
                if id(member.param) in found:
                    member.count(number, found[id(member.param)])
        if not self._agreed:
            if not self._first_round({}):
                return
            if self._refused():
                self._leave_out_those_on_the_host()
        if self._error is not None:
            raise self._error
        for _, steps in running:
            for _ in steps:  # what a rule's settings do without, engines sum all the same
                pass
        for executor, share in self._parts:
            if not share.exchanges:
                executor.run()

    def _begin(self, number: int) -> list[Running]:
        """Those whose first stop is in a round."""
        first = [executor for executor, share in self._parts if share.exchanges and share.first == number]
        return [(executor, executor.rounds()) for executor in first]

    def _requests(self, number: int, found: dict[int, list[PartialSums]]) -> list[Request]:
        # what no rank has a gradient of is left out, once that is known
        known = self._agreed and self._layout.waits
        members = [m for m in self._layout.exchanging if not known or m.param.grad is not None]
        return [r for m in members for r in m.requests(number, found.get(id(m.param)))]

    def _first_round(self, found: dict[int, list[PartialSums]]) -> bool:
        """Exchanges what all ranks have to know before any writes; False if the step changes nothing."""
        squares, requests = self._squares() if self._layout.clips else ([], [])
        if not self._agree([*requests, *self._requests(0, found)]):
            return False
        self._norm_squares = squares
        if self._plan is not None and (squares or not self._layout.waits):
            refusal = None if self._layout.waits else self._word.refusal()
            self._plan.prepare(self._optimizer, self._scaling, squares, refusal)
        return True

    def _refused(self) -> bool:
        """Whether executors that read the host have to change nothing, though no rank waits otherwise."""
        if self._layout.waits or not any(executor.reads_host for executor, _ in self._parts):
            return False
        verdict = self._word.verdict()
        return verdict.failed or verdict.found_inf or not verdict.same

    def _leave_out_those_on_the_host(self) -> None:
        self._parts = [(executor, share) for executor, share in self._parts if not executor.reads_host]

    def _too_large(self) -> bool:
        """Whether fp32 may not hold the squares of gradients before they are clipped; as all ranks see it."""
        norm = math.sqrt(sum(map(float, self._norm_squares))) * self._scaling.factor([])
        return not norm < LARGEST

    def _clip(self, found: dict[int, list[PartialSums]]) -> None:
        """Makes sums of gradients before clipping those of gradients after it."""
        factor = self._scaling.factor(self._norm_squares) / self._scaling.factor([])
        riding = [(m, found[id(m.param)]) for m in self._layout.riding if id(m.param) in found]
        pairs = [pair for member, sums in riding for pair in member.clip(factor, sums)]
        if pairs:
            torch._foreach_mul_([values for values, _ in pairs], [by for _, by in pairs])

    def _agree(self, requests: list[Request]) -> bool:
        """Exchanges the requests with this rank's word; False if the step changes nothing on any."""
        exchange([self._word.request, *requests])
        self._agreed = True
        if not self._layout.waits:
            self._layout.late = self._word
            return True
        if self._error is not None:
            raise self._error
        verdict = self._word.verdict()
        _raise_if_refused(verdict, self._layout.absent())
        return not verdict.found_inf

    def _squares(self) -> tuple[list[torch.Tensor], list[Request]]:
        """The sums of squares of the gradients, one for the groups over which they are summed."""
        squares: dict[tuple[object, ...], torch.Tensor] = {
            (): torch.zeros((), dtype=torch.float64, device=self._layout.device)
        }
        requests = []
        for member in self._layout.members:
            if member.groups not in squares:
                squares[member.groups] = torch.zeros((), dtype=torch.float64, device=member.device)
                requests.append(Request(squares[member.groups], member.groups, member.device))
        for executor, share in self._parts:
            squares[share.groups] += executor.gradient_squares()
        return list(squares.values()), requests


def _at_stop(running: list[Running]) -> dict[int, list[PartialSums]]:
    """The sums of this rank where all have come to the next stop, by the parameters' ids."""
    stops = [next(steps, []) for _, steps in running]
    return {id(spec.param): sums for stop in stops for spec, sums in stop}
