"""What the ranks exchange in a step: the same on all of them, whichever gradients they have."""

from __future__ import annotations

import math
import operator
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from .agreement import Agreement
from .capture import is_capturing
from .exchange import Request
from .listed_rows import nonzero_rows
from .partial_sums import PartialSums, Statistic
from .places import name_at
from .scale import Scaling
from .sharding import groups_of, is_sharded, local
from .step_rule import StepRule
from .summands import Summands, copied


class Share(NamedTuple):
    """How a tensor takes part in exchanges."""

    exchanges: bool  # whether its step needs sums of other ranks
    first: int  # round of exchanges, which is its first stop
    groups: tuple[Any, ...]  # over which squares of its gradient are summed, where steps are clipped


ALONE = Share(False, 0, ())


class Exchanged(NamedTuple):
    """A sum that a rule takes over a parameter with parts on other ranks."""

    groups: tuple[Any, ...]  # whose ranks have other parts of it; none where it is whole here
    shape: tuple[int, ...]  # of the values of this rank
    size: int  # how many elements of the whole parameter each value sums


class Member:
    """A parameter with parts on other ranks.

    stops: what its step sums over it, one in each round of exchanges from the first on. rows: those that take
    part in this step as all ranks see it, where only some rows are stepped and ranks have parts of them.
    """

    def __init__(
        self, param: torch.Tensor, name: str, stops: Sequence[Sequence[Statistic]], lazy: bool, first: int
    ) -> None:
        self.param, self.name, self.stops, self.first = param, name, stops, first
        self.groups = groups_of(param, range(param.ndim))
        self.of_rows = groups_of(param, range(1, param.ndim)) if lazy else ()
        self.rows: torch.Tensor | None = None
        kind: str = param.device_mesh.device_type  # type: ignore[attr-defined]
        # where its process groups take numbers
        self.device = param.device if param.device.type == kind else torch.device(kind)
        whole, part = tuple(param.shape), tuple(local(param).shape)
        self._exchanged = [
            [Exchanged(groups_of(param, one.dims), one.shape(part), one.count(whole)) for one in stop]
            for stop in stops
        ]
        self.exchanges = any(one.groups for stop in self._exchanged for one in stop)

    def flags(self) -> Request:
        """Which rows have a gradient here."""
        own, g = local(self.param), self.param.grad
        flags = torch.zeros(own.shape[0], dtype=torch.float64, device=self.device)
        if g is not None and local(g).shape == own.shape:  # else the step will say what is wrong
            flags[nonzero_rows(local(g))] = 1.0
        return Request(flags, self.of_rows, self.device)

    def sums(self, number: int) -> list[tuple[tuple[Any, ...], int]]:
        """The groups over which sums of one round are exchanged, and how many numbers each is."""
        return [(one.groups, math.prod(one.shape)) for one in self._at(number) if one.groups]

    def requests(self, number: int, found: Sequence[PartialSums] | None) -> list[Request]:
        """Of one round; found: the sums of this rank, None for zeros."""
        requests = []
        for i, one in enumerate(self._at(number)):
            if one.groups:
                values = (
                    torch.zeros(one.shape, dtype=torch.float64, device=self.device)
                    if found is None
                    else found[i].values
                )
                requests.append(Request(values, one.groups, self.device))
        return requests

    def count(self, number: int, found: Sequence[PartialSums]) -> None:
        """Says that sums are of the whole parameter by now."""
        exchanged = self._at(number)  # none where engines sum what settings do without
        for one, sums in zip(exchanged, found[: len(exchanged)], strict=True):
            sums.count = one.size

    def clip(self, factor: float, found: Sequence[PartialSums]) -> list[tuple[torch.Tensor, float]]:
        """Sums of the first stop, each with what makes it one of gradients times a factor."""
        at_first = zip(self.stops[0], found, strict=True)
        return [(sums.values, factor**one.power) for one, sums in at_first if one.power]

    def _at(self, number: int) -> list[Exchanged]:
        stop = number - self.first
        return self._exchanged[stop] if 0 <= stop < len(self._exchanged) else []


class Layout:
    """The exchanges of an optimizer's steps.

    The norm of the gradients, where they are clipped, needs a round of its own, before there are other sums.
    But those that may be multiplied by the factor that clips afterwards go with it, where the host waits.
    """

    def __init__(self, optimizer: StepRule, before: Layout | None = None) -> None:
        self._params = [list(group["params"]) for group in optimizer.param_groups]
        self._structures = _structures(optimizer)
        self.clips, self.waits = optimizer.max_grad_norm is not None, not optimizer.counters_on_device
        self.members: list[Member] = []
        self._sharded: list[tuple[torch.Tensor, bool]] = []  # and whether they are trained
        seen: set[int] = set()
        for index, group in enumerate(optimizer.param_groups):
            for j, p in enumerate(group["params"]):
                if id(p) in seen:
                    continue
                seen.add(id(p))
                if not is_sharded(p):
                    continue
                self._sharded.append((p, p.requires_grad))
                if p.requires_grad:
                    name = name_at(optimizer.param_groups, (index, j))
                    stops = optimizer.sums(group, tuple(p.shape))
                    lazy = optimizer.sparse_mode(group) is not None
                    self.members.append(Member(p, name, stops, lazy, self._first_round(stops)))
        self.exchanging = [member for member in self.members if member.exchanges]
        self.riding = [member for member in self.exchanging if self.clips and member.first == 0]
        self.rounds = max((m.first + len(m.stops) for m in self.exchanging), default=int(self.clips))
        self.lazy = [member for member in self.members if member.of_rows]
        of_copies = (copied(m.param, m.groups, m.device) for m in self.members if optimizer.takes_gradients)
        self._summands: Summands = Summands(
            [one for one in of_copies if one is not None], None if before is None else before._summands
        )
        self._find_groups()
        self.of = {id(member.param): member for member in self.members}
        self.late: Agreement | None = None  # of the last step, where nobody has waited for it

    def fits(self, optimizer: StepRule) -> bool:
        """Whether the optimizer's steps are still these."""
        groups = optimizer.param_groups
        if len(groups) != len(self._params) or self._structures != _structures(optimizer):
            return False
        if self.waits == optimizer.counters_on_device:
            return False
        if any(p.requires_grad != trained for p, trained in self._sharded):
            return False
        return all(
            len(group["params"]) == len(params) and all(map(operator.is_, group["params"], params))
            for group, params in zip(groups, self._params, strict=True)
        )

    def share(self, p: torch.Tensor) -> Share:
        member = self.of.get(id(p))
        if member is None:
            return ALONE
        first = member.first if member.exchanges else 0
        return Share(member.exchanges, first, member.groups if self.clips else ())

    def ask_for_summands(self) -> None:
        """Finds out of which gradients ranks have summands; all ranks ask until they know of each."""
        if self._summands.ask():
            self._find_groups()

    @contextmanager
    def settled_gradients(self) -> Iterator[None]:
        """With summands added up. They are back after an error, also one that ranks hear of a step later."""
        self._summands.add_up()
        try:
            yield
        except BaseException:
            self._summands.put_back()
            raise
        if self.waits:
            self._summands.forget()

    def put_summands_back(self) -> None:
        self._summands.put_back()

    def described(self) -> bytes:
        """All that ranks have to have alike."""
        placements = [str(m.param.placements) for m in self.members]  # type: ignore[attr-defined]
        shapes = [(tuple(m.param.shape), m.stops, bool(m.of_rows)) for m in self.members]
        return repr((shapes, placements, self.clips, self.waits)).encode()

    def groups(self, scaling: Scaling) -> list[Any]:
        """Whose ranks have to agree on a step: all, where each could have found infinities by itself."""
        flagged = scaling.found_inf is not None and not is_capturing(self.device)
        return self._all_groups if flagged else self._groups

    def _first_round(self, stops: Sequence[Sequence[Statistic]]) -> int:
        rides = self.waits and bool(stops) and all(one.power is not None for one in stops[0])
        return int(self.clips and not rides)

    def _find_groups(self) -> None:
        """Those whose ranks have to agree on a step, in an order that all have."""
        of_summands = {p: one.summing for p, one in self._summands.of.items()}
        taking_part: list[Any] = []
        everybody: list[Any] = []
        for member in self.members:
            summing = of_summands.get(id(member.param), ())
            everybody += (*member.groups, *summing)
            if self.clips or member.exchanges or member.of_rows or summing:
                taking_part += (*member.groups, *summing)
        self._groups, self._all_groups = ([*dict.fromkeys(groups)] for groups in (taking_part, everybody))
        self.device = self.members[0].device if self.members else torch.device("cpu")
        self.agreed = False

    def mask(self) -> bytes:
        """Which sharded parameters have a gradient here, and of which it was a summand."""
        settled = self._summands.settled
        return bytes(0 if member.param.grad is None else 1 + settled(member.param) for member in self.members)

    def absent(self) -> list[str]:
        """Those that have none."""
        return [member.name for member in self.members if member.param.grad is None]


def needs_other_ranks(optimizer: StepRule, group: dict[str, Any], p: torch.Tensor) -> bool:
    """Whether a step of the parameter does, or the norm of its gradient."""
    if not is_sharded(p):
        return False
    if optimizer.max_grad_norm is not None and groups_of(p, range(p.ndim)):
        return True
    sums = (s for stop in optimizer.sums(group, tuple(p.shape)) for s in stop)
    lazy = optimizer.sparse_mode(group) is not None
    return any(groups_of(p, s.dims) for s in sums) or (lazy and bool(groups_of(p, range(1, p.ndim))))


def _structures(optimizer: StepRule) -> list[Hashable]:
    return [optimizer.structure(group) for group in optimizer.param_groups]
