"""Processes on one machine, parameters on meshes of them, and gradients that are the same on every mesh."""

from __future__ import annotations

import datetime
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

import ranks as processes
from cases import values

PATIENCE = datetime.timedelta(seconds=60)  # for which a rank waits for the others
# rows that four ranks cannot share evenly, fewer rows than ranks, no rows on some, three and four dimensions
SHAPES: dict[str, tuple[int, ...]] = {
    "embedding": (11, 6),
    "up": (10, 7),
    "down": (7, 10),
    "thin": (2, 9),
    "row": (1, 5),
    "norm": (7,),
    "one": (1,),
    "conv": (5, 4, 3, 3),
    "experts": (5, 6, 8),
    "large": (130, 140),
}
Layout = Callable[[str], tuple[DeviceMesh, Sequence[Any]]]  # of a parameter by its name


def run_on(ranks: int, work: Callable[..., None], *arguments: object) -> None:
    """Calls work(rank, *arguments) in as many processes with a group of gloo; raises what one raises."""
    processes.run_on(ranks, _with_rank, work, arguments, patience=PATIENCE)


def _with_rank(work: Callable[..., None], arguments: Sequence[object]) -> None:
    work(dist.get_rank(), *arguments)


@functools.cache
def mesh_of(sizes: tuple[int, ...], names: tuple[str, ...]) -> DeviceMesh:
    return init_device_mesh("cpu", sizes, mesh_dim_names=names)


def fsdp() -> Layout:
    mesh = mesh_of((dist.get_world_size(),), ("dp",))
    return lambda name: (mesh, [Shard(0)])


def hsdp() -> Layout:
    mesh = mesh_of((2, dist.get_world_size() // 2), ("replicate", "shard"))
    return lambda name: (mesh, [Replicate(), Shard(0)])


def tp() -> Layout:
    mesh = mesh_of((dist.get_world_size(),), ("tp",))
    columns = ("down", "conv", "embedding", "large")
    whole = ("norm", "one")
    return lambda name: (mesh, [Replicate() if name in whole else Shard(1 if name in columns else 0)])


def tp_fsdp() -> Layout:
    mesh = mesh_of((2, dist.get_world_size() // 2), ("dp", "tp"))
    row_wise, plain = [Shard(0), Shard(1)], [Shard(0), Replicate()]
    placed = dict(down=row_wise, large=row_wise, thin=row_wise, norm=plain, one=plain, conv=plain)
    column_wise = [_StridedShard(0, split_factor=mesh.size(1)), Shard(0)]
    return lambda name: (mesh, placed.get(name, column_wise))


def experts() -> Layout:
    """Two meshes over the same ranks."""
    ranks = dist.get_world_size()
    dense, sparse = mesh_of((ranks,), ("dp",)), mesh_of((2, ranks // 2), ("efsdp", "ep"))
    placed = dict(experts=[Shard(1), Shard(0)], conv=[_StridedShard(0, split_factor=ranks // 2), Shard(0)])
    return lambda name: (sparse, placed[name]) if name in placed else (dense, [Shard(0)])


def placed(full: torch.Tensor, mesh: DeviceMesh, placements: Sequence[Any]) -> torch.Tensor:
    """This rank's part, of what every rank has; `distribute_tensor` refuses _StridedShard, which later mesh
    dimensions cut first.
    """
    if not any(isinstance(at, _StridedShard) for at in placements):
        return distribute_tensor(full.clone(), mesh, placements, src_data_rank=None)
    part, coordinate = full, mesh.get_coordinate()
    assert coordinate is not None
    for k in reversed(range(mesh.ndim)):
        if isinstance(placements[k], Replicate):
            continue
        d = placements[k].dim
        pieces = part.chunk(mesh.size(k), d)
        part = pieces[coordinate[k]] if coordinate[k] < len(pieces) else part.narrow(d, 0, 0)
    return DTensor.from_local(
        part.contiguous(), mesh, placements, run_check=False, shape=full.shape, stride=full.stride()
    )


def full(t: torch.Tensor) -> torch.Tensor:
    return t.full_tensor() if isinstance(t, DTensor) else t


def parameters(
    layout: Layout | None = None, dtype: torch.dtype = torch.float32
) -> dict[str, torch.nn.Parameter]:
    """Placed, or whole."""
    made = {}
    for i, (name, shape) in enumerate(SHAPES.items()):
        x = (values(shape, i, wild=False) * 0.1).to(dtype)
        made[name] = torch.nn.Parameter(x if layout is None else placed(x, *layout(name)))
    return made


def gradient(name: str, t: int) -> torch.Tensor:
    """With rows of different sizes, some of them zero."""
    shape = SHAPES[name]
    g = values(shape, 1000 * t + list(SHAPES).index(name), wild=False)
    if len(shape) > 1:
        g = g * torch.logspace(-3, 1, shape[0]).view(-1, *[1] * (len(shape) - 1))
        if t % 2 and shape[0] > 2:
            g[1] = 0
    return g


def give_gradients(params: dict[str, torch.nn.Parameter], t: int, layout: Layout | None = None) -> None:
    for name, p in params.items():
        g = gradient(name, t).to(p.dtype)
        p.grad = g if layout is None else placed(g, *layout(name))
