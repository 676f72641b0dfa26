"""Sums over ranks that have other parts of tensors, or summands: an all-reduce for each process group."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

# numbers that are not worth a copy into a buffer with others
ALONE = 2**20


@dataclass(slots=True)
class Request:
    """Numbers of this rank, which become their sums over the ranks of some groups, one group after the other.

    Whoever shares a group makes the same requests of it, in the same order.
    """

    values: torch.Tensor  # contiguous
    groups: tuple[Any, ...]
    device: torch.device  # where the groups can take them


def groups_in_order(requests: Iterable[Request]) -> list[Any]:
    """Each group once, by its first use: all ranks that share some have them in the same order."""
    return list(dict.fromkeys(group for request in requests for group in request.groups))


def exchange(requests: Sequence[Request]) -> None:
    """Puts the sums in place of the values."""
    for group in groups_in_order(requests):
        buffers: dict[tuple[torch.dtype, int | None], list[Request]] = {}
        for i, request in enumerate(requests):
            if group in request.groups:
                alone = i if request.values.numel() >= ALONE else None
                buffers.setdefault((request.values.dtype, alone), []).append(request)
        for members in buffers.values():
            _all_reduce(members, group)


def _all_reduce(members: Sequence[Request], group: Any) -> None:
    import torch.distributed as dist  # not for those who have one rank

    values = [member.values.view(-1) for member in members]
    device = members[0].device
    if len(values) == 1 and values[0].device == device:
        dist.all_reduce(values[0], group=group)
        return
    flat = torch.cat([x if x.device == device else x.to(device) for x in values])
    dist.all_reduce(flat, group=group)
    torch._foreach_copy_(values, torch.split(flat, [x.numel() for x in values]))
