"""Gradients of which ranks have summands, as plain tensor parallelism leaves them for what it replicates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .capture import is_capturing
from .exchange import Request, exchange
from .sharding import copied_dims, is_sharded, local, placed_alike, sharded_dim

BUCKET = 2**22  # numbers that are added up together


class Copied:
    """A parameter of which several ranks have the same part.

    groups: of the ranks that have other parts. dims: of the mesh, along which ranks have summands of its
    gradient; None as long as no rank has shown one.
    """

    def __init__(
        self, param: torch.Tensor, copies: Mapping[int, Any], groups: tuple[Any, ...], device: torch.device
    ) -> None:
        self.param, self._copies, self._groups, self._device = param, copies, groups, device
        # a mesh dimension of one rank adds nothing up
        self.dims: tuple[int, ...] | None = () if {*copies.values()} == {None} else None
        self.settled = False  # whether the sum stands in place of this rank's summand

    @property
    def summing(self) -> tuple[Any, ...]:
        """The groups whose ranks have summands."""
        return tuple(self._copies[k] for k in self.dims or ())

    @property
    def alone(self) -> bool:
        """Whether its gradient may be called a summand, and is the sum."""
        return None in self._copies.values()

    def question(self) -> Request:
        """Whether this rank has a gradient, and where it is a summand; to all ranks of the mesh."""
        here = summand_dims(self.param)
        numbers = [self.param.grad is not None, *(k in here for k in self._copies)]
        groups = [group for group in self._copies.values() if group is not None]
        values = torch.tensor(numbers, dtype=torch.float64, device=self._device)
        return Request(values, (*groups, *self._groups), self._device)

    def learn(self, answer: Request) -> None:
        seen, *kinds = answer.values.tolist()
        if seen:
            of_dims = zip(self._copies.items(), kinds, strict=True)
            self.dims = tuple(k for (k, group), kind in of_dims if kind and group is not None)

    def summand(self) -> Request:
        """Of this rank, in float32 at least; zeros where it has none."""
        g: Any = self.param.grad
        own = local(self.param)
        wide = torch.float64 if own.dtype == torch.float64 else torch.float32
        values = torch.zeros(own.shape, dtype=wide, device=own.device)
        here = summand_dims(self.param)
        along = [k for k in here if self._copies[k] is not None]
        self.settled = bool(here) and tuple(along) == self.dims and local(g).shape == own.shape
        if self.settled:
            values.copy_(local(g))
            for k in here:
                if g.placements[k].reduce_op == "avg":
                    values /= g.device_mesh.size(k)
        return Request(values, self.summing, self._device)


class Summands:
    """Those of all parameters that several ranks have alike; `before`: what is known of some already."""

    def __init__(self, copied: Sequence[Copied], before: Summands | None) -> None:
        self._copied = copied
        self._put: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []  # parameter, sum, summand
        known = {} if before is None else {id(one.param): one.dims for one in before._copied}
        for one in copied:
            if one.dims is None:
                one.dims = known.get(id(one.param))
        self.of = {id(one.param): one for one in copied}

    def ask(self) -> bool:
        """Whether ranks have told something new; they ask until all parameters had gradients somewhere."""
        for one in self._copied:
            if one.alone and not one.summing and summand_dims(one.param):
                one.param.grad = placed_alike(one.param, local(one.param.grad))  # type: ignore[arg-type]
        unknown = [one for one in self._copied if one.dims is None]
        if not unknown or is_capturing(local(unknown[0].param).device):
            return False
        told = [(one, one.question()) for one in unknown]
        exchange([request for _, request in told])
        for one, answer in told:
            one.learn(answer)
        return any(one.dims is not None for one in unknown)

    def add_up(self) -> None:
        """Puts sums in place of summands. A rank that lacks one joins with zeros."""
        self._put = []
        bucket: list[tuple[Copied, Request]] = []
        for one in self._copied:
            if one.summing:
                bucket.append((one, one.summand()))
                if sum(request.values.numel() for _, request in bucket) >= BUCKET:
                    self._add_up(bucket)
                    bucket = []
        self._add_up(bucket)

    def put_back(self) -> None:
        """The summands, of gradients that are still the sums."""
        for p, total, g in self._put:
            if p.grad is total:
                p.grad = g
        self._put = []

    def forget(self) -> None:
        """What it could put back."""
        self._put = []

    def settled(self, p: torch.Tensor) -> bool:
        one = self.of.get(id(p))
        return one is not None and one.settled

    def _add_up(self, bucket: Sequence[tuple[Copied, Request]]) -> None:
        exchange([request for _, request in bucket])
        for one, request in bucket:
            g = one.param.grad
            if g is not None and one.settled:
                one.param.grad = placed_alike(one.param, request.values.to(g.dtype))
                self._put.append((one.param, one.param.grad, g))


def summand_dims(p: torch.Tensor) -> tuple[int, ...]:
    """Of the mesh, along which ranks have summands of the gradient; none if it is placed otherwise, too."""
    g: Any = p.grad
    if g is None or not is_sharded(g) or g.device_mesh != p.device_mesh:  # type: ignore[attr-defined]
        return ()
    found = []
    for k, (own, wanted) in enumerate(zip(g.placements, p.placements, strict=True)):  # type: ignore[attr-defined]
        if own == wanted:
            continue
        if sharded_dim(wanted) is not None or getattr(own, "reduce_op", None) not in ("sum", "avg"):
            return ()
        found.append(k)
    return tuple(found)


def copied(param: torch.Tensor, groups: tuple[Any, ...], device: torch.device) -> Copied | None:
    """None if no two ranks have the same part."""
    copies = copied_dims(param)
    return Copied(param, copies, groups, device) if copies else None
