"""A step whose tensors have parts on other ranks: all agree before any writes, then go from stop to stop."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from .agreement import Agreement, Verdict
from .capture import is_capturing
from .exchange import Request, exchange
from .layout import Layout
from .partial_sums import PartialSums
from .plan import Plan
from .scale import Scaling
from .spec import Stop
from .step_rule import StepRule


def step(optimizer: StepRule, layout: Layout, scaling: Scaling, begin: Callable[[], Plan]) -> None:
    """Makes a step with all ranks. begin: gives a plan whose step has begun, or raises.

    Raises on every rank, with nothing written on any: what was wrong on this one, else RuntimeError. Where
    counters are on a device no rank waits for it: the others raise in their next step.
    """
    if is_capturing(layout.device):
        raise RuntimeError("danlu: a step that needs other ranks cannot be captured in a CUDA graph")
    _compare(layout)
    if layout.late is not None:
        late, layout.late = layout.late, None
        _raise_if_refused(late.verdict(), None)
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


def _compare(layout: Layout) -> None:
    """Once: buffers of other sizes would be added up without an error, or never."""
    if layout.agreed:
        return
    word = Agreement(layout.groups, layout.device, layout.described())
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
        raise RuntimeError(f"danlu: gradients are missing on some ranks only; nothing was changed.{here}")


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
        self._waits = not optimizer.counters_on_device
        self._agreed = False
        self._word = Agreement(
            layout.groups,
            layout.device,
            layout.mask(),
            failed=error is not None,
            found_inf=scaling.found_inf_on(layout.device),
        )

    def run(self) -> None:
        squares: list[torch.Tensor] = []
        if self._layout.clips:
            by_groups, requests = self._squares()
            if not self._agree(requests):
                return
            squares = list(by_groups.values())
            self._prepare(squares)
        running = [executor.rounds() for executor, share in self._parts if share.exchanges]
        for number in range(self._layout.stops):
            found = _at_stop(running)
            # what no rank has a gradient of is left out, once that is known
            known = self._agreed and self._waits
            members = [m for m in self._layout.exchanging if not known or m.param.grad is not None]
            requests = [r for m in members for r in m.requests(number, found.get(id(m.param)))]
            if self._agreed:
                exchange(requests)
            elif self._agree(requests):
                self._prepare(squares)
            else:
                return
            for member in members:
                member.count(number, found.get(id(member.param)))
        if not self._agreed:
            if not self._agree([]):
                return
            self._prepare(squares)
        if self._error is not None:
            raise self._error
        for steps in running:
            for _ in steps:  # what a rule's settings do without, engines sum all the same
                pass
        for executor, share in self._parts:
            if not share.exchanges:
                executor.run()

    def _agree(self, requests: list[Request]) -> bool:
        """Exchanges the requests with this rank's word; False if the step changes nothing on any."""
        exchange([self._word.request, *requests])
        self._agreed = True
        if not self._waits:
            self._layout.late = self._word
            return True
        if self._error is not None:
            raise self._error
        verdict = self._word.verdict()
        _raise_if_refused(verdict, self._layout.absent())
        return not verdict.found_inf

    def _prepare(self, squares: list[torch.Tensor]) -> None:
        """Again, by what is known of all ranks by now."""
        if self._plan is not None and (squares or not self._waits):
            refusal = None if self._waits else self._word.refusal()
            self._plan.prepare(self._optimizer, self._scaling, squares, refusal)

    def _squares(self) -> tuple[dict[tuple[object, ...], torch.Tensor], list[Request]]:
        """The sums of squares of the gradients, by the groups over which they are summed."""
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
        return squares, requests


def _at_stop(running: list[Iterator[Stop]]) -> dict[int, list[PartialSums]]:
    """The sums of this rank where all have come to the next stop, by the parameters' ids."""
    stops = [next(steps, []) for steps in running]
    return {id(spec.param): sums for stop in stops for spec, sums in stop}
