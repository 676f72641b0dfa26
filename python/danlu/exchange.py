"""Sums over the ranks that have other parts of tensors: one all-reduce for each process group."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass
class Request:
    """Numbers of this rank, which become their sums over the ranks of some groups, one group after the other.

    Whoever shares a group makes the same requests of it, in the same order.
    """

    values: torch.Tensor  # float64
    groups: tuple[Any, ...]
    device: torch.device  # where the groups can take them


def groups_in_order(requests: Iterable[Request]) -> list[Any]:
    """Each group once, by its first use: all ranks that share some have them in the same order."""
    return list(dict.fromkeys(group for request in requests for group in request.groups))


def exchange(requests: Sequence[Request]) -> None:
    """Puts the sums in place of the values."""
    import torch.distributed as dist  # not for those who have one rank

    for group in groups_in_order(requests):
        members = [request for request in requests if group in request.groups]
        device = members[0].device
        flat = torch.cat([member.values.reshape(-1).to(device) for member in members])
        dist.all_reduce(flat, group=group)
        parts = torch.split(flat, [member.values.numel() for member in members])
        torch._foreach_copy_(
            [member.values for member in members],
            [part.view(member.values.shape) for member, part in zip(members, parts, strict=True)],
        )
