"""What ranks exchange in a step, on paper: all-reduces and bytes for a model on a mesh.

    python bench/sharded.py [--model llama-3-8b] [--ranks 1024] [--tp 8]

Parameters are sharded as by FSDP2, with --tp also as by tensor parallelism over so many neighbouring ranks.
It needs one process: the ranks are pretended (torch's fake process group). The counts are those of danlu's
own layout, for rank 0.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore

import danlu
import workloads
from danlu.agreement import NUMBERS
from danlu.layout import Layout

MODELS = {make().id: make for make in (workloads.gpt2_small, workloads.llama_1b, workloads.llama_8b)}
OPTIMIZERS: dict[str, Callable[[list[torch.nn.Parameter]], danlu.FusedOptimizer]] = {
    "AdamW": danlu.AdamW,
    "AdamW, clipped": lambda params: danlu.AdamW(params, max_grad_norm=1.0),
    "Adafactor": danlu.Adafactor,
    "Adafactor, clipped": lambda params: danlu.Adafactor(params, max_grad_norm=1.0),
    "LAMB": danlu.LAMB,
    "LayerAdaptation(Lion)": lambda params: danlu.LayerAdaptation(danlu.Lion(params)),
    "Amos": lambda params: danlu.Amos(params, lr=1e-3),
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, default="llama-3-8b")
    parser.add_argument("--ranks", type=int, default=1024)
    parser.add_argument("--tp", type=int, default=1, help="ranks of tensor parallelism")
    options = parser.parse_args(arguments)
    if options.ranks % options.tp:
        parser.error(f"--tp {options.tp} does not divide --ranks {options.ranks}")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=options.ranks)
    try:
        mesh = init_device_mesh("cpu", (options.ranks // options.tp, options.tp), mesh_dim_names=("dp", "tp"))
        model = MODELS[options.model]()
        params = [torch.nn.Parameter(placed(shape, mesh)) for shape in model.shapes]
        print(f"{model.title}; {options.ranks} ranks, tensor parallelism of {options.tp}")
        print(f"{'':<24} all-reduces of a step   kB of each rank")
        for name, make in OPTIMIZERS.items():
            reduces, size = exchanged(make(params))
            print(f"{name:<24} {reduces:>21}   {size / 1e3:15.1f}")
    finally:
        dist.destroy_process_group()


def placed(shape: tuple[int, ...], mesh: DeviceMesh) -> DTensor:
    """A DTensor without numbers: matrices that shrink are cut along columns by tp, others along rows."""
    dp, tp = mesh.size(0), mesh.size(1)
    by_tp: Placement = Replicate() if len(shape) < 2 else Shard(1 if shape[0] < shape[1] else 0)
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


def exchanged(optimizer: danlu.FusedOptimizer) -> tuple[int, int]:
    """All-reduces, and the bytes that this rank puts into them."""
    layout = Layout(optimizer)
    if not layout.groups:
        return 0, 0
    rounds = [[sum_ for member in layout.exchanging for sum_ in member.sums(k)] for k in range(layout.rounds)]
    if layout.clips:
        rounds[0] += [(groups, 1) for groups in dict.fromkeys(m.groups for m in layout.members)]
    rounds[0].append((tuple(layout.groups), NUMBERS))
    reduces = sum(len({group for groups, _ in sums for group in groups}) for sums in rounds)
    return reduces, sum(8 * size * len(groups) for sums in rounds for groups, size in sums)


if __name__ == "__main__":
    main()
