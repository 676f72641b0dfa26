"""What ranks exchange in a step, on paper: by danlu's own layout of a model on a mesh of pretended ranks.

Times are those that NCCL's constants give (network.py), one all-reduce after the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore

import danlu
import network
from danlu.agreement import NUMBERS
from danlu.layout import Layout
from danlu.scale import Scaling
from workloads import Workload

OPTIMIZERS: dict[str, Callable[[list[torch.nn.Parameter]], danlu.FusedOptimizer]] = {
    "adamw": danlu.AdamW,
    "adamw+norm": lambda params: danlu.AdamW(params, max_grad_norm=1.0),
    "adafactor": danlu.Adafactor,
    "adafactor+norm": lambda params: danlu.Adafactor(params, max_grad_norm=1.0),
    "lamb": danlu.LAMB,
    "lamb+norm": lambda params: danlu.LAMB(params, max_grad_norm=1.0),
    "layer": lambda params: danlu.LayerAdaptation(danlu.Lion(params)),
    "amos": lambda params: danlu.Amos(params, lr=1e-3),
}


@dataclass(frozen=True)
class AllReduce:
    """One of rank 0 in a step."""

    round: int
    over: str  # the mesh dimension
    ranks: int
    on_node: int  # of them
    numbers: int

    @property
    def bytes(self) -> int:
        return 8 * self.numbers  # float64

    @property
    def us(self) -> float:
        return network.all_reduce(self.bytes, self.ranks, self.on_node)


@contextmanager
def pretended(ranks: int, tp: int) -> Iterator[DeviceMesh]:
    """A mesh of ranks, of which this process is the first. Tensor parallelism is among neighbours."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        yield init_device_mesh("cpu", (ranks // tp, tp), mesh_dim_names=("dp", "tp"))
    finally:
        dist.destroy_process_group()


def sharded(model: Workload, mesh: DeviceMesh) -> list[torch.nn.Parameter]:
    """As FSDP2 leaves them, and tensor parallelism where the mesh has it. They have no numbers."""
    placed = [placed_on(mesh, shape, i in model.by_columns) for i, shape in enumerate(model.shapes)]
    return [torch.nn.Parameter(p) for p in placed]


def placed_on(mesh: DeviceMesh, shape: tuple[int, ...], by_columns: bool) -> DTensor:
    dp, tp = mesh.size(0), mesh.size(1)
    by_tp: Placement = Replicate() if len(shape) < 2 else Shard(int(by_columns))
    by_dp: Placement = _StridedShard(0, split_factor=tp) if tp > 1 and by_tp == Shard(0) else Shard(0)
    part = list(shape)
    if isinstance(by_tp, Shard):
        part[by_tp.dim] = math.ceil(part[by_tp.dim] / tp)
    part[0] = math.ceil(part[0] / dp)
    strides = torch.empty(shape, device="meta").stride()
    own = torch.empty(part, device="meta")
    return DTensor.from_local(
        own, mesh, [by_dp, by_tp], run_check=False, shape=torch.Size(shape), stride=strides
    )


def of_a_step(optimizer: danlu.FusedOptimizer, mesh: DeviceMesh) -> list[AllReduce]:
    """All-reduces of a step in which every parameter has a gradient; the first step has one more."""
    layout = Layout(optimizer)
    agreeing = tuple(layout.groups(Scaling.of(optimizer, optimizer.max_grad_norm)))
    if not agreeing:
        return []
    rounds = [[sum_ for member in layout.exchanging for sum_ in member.sums(k)] for k in range(layout.rounds)]
    if layout.clips:
        rounds[0] += [(groups, 1) for groups in dict.fromkeys(m.groups for m in layout.members)]
    rounds[0].append((agreeing, NUMBERS))
    names = {mesh.get_group(name): name for name in ("dp", "tp")}
    found = []
    for number, sums in enumerate(rounds):
        for group in dict.fromkeys(group for groups, _ in sums for group in groups):
            numbers = sum(size for groups, size in sums if group in groups)
            found.append(AllReduce(number, names[group], group.size(), on_node(mesh, names[group]), numbers))
    return found


def on_node(mesh: DeviceMesh, name: str) -> int:
    """How many of the ranks along a mesh dimension share a node."""
    tp = mesh.size(1)
    if name == "tp":
        return min(tp, network.GPUS_OF_NODE)
    return max(1, min(mesh.size(0), network.GPUS_OF_NODE // tp))


def reduce_scatter_us(model: Workload, mesh: DeviceMesh) -> float:
    """What FSDP2 spends on the gradients of a step, in bf16."""
    size = 2 * model.elements / mesh.size(1)
    return network.reduce_scatter(size, mesh.size(0), on_node(mesh, "dp"))


def total_us(exchanged: Sequence[AllReduce]) -> float:
    return sum(one.us for one in exchanged)
