"""Parameters of which each rank has a part: DTensors, and flat pieces that look like plain tensors.

Nothing here imports torch.distributed, for those who do not use it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch

from .fake import is_fake
from .step_rule import StepRule

# these types themselves, whose tensors stand for nothing but their memory
PLAIN = (torch.Tensor, torch.nn.Parameter)


def dtensor_type() -> type | None:
    """DTensor, or None as long as nobody has imported it, when no tensor can be one."""
    module = sys.modules.get("torch.distributed.tensor")
    return None if module is None else getattr(module, "DTensor", None)


def is_sharded(t: torch.Tensor) -> bool:
    if type(t) in PLAIN:  # what nearly all are, and asked often
        return False
    kind = dtensor_type()
    return kind is not None and isinstance(t, kind)


def local(t: torch.Tensor) -> torch.Tensor:
    """The shard of a DTensor that lives on this rank; any other tensor as it is."""
    return t._local_tensor if is_sharded(t) else t  # type: ignore[attr-defined]


def placements(t: torch.Tensor) -> Any:
    """Of a DTensor; None for another tensor."""
    return getattr(t, "placements", None)


def sharded_alike(a: torch.Tensor, b: torch.Tensor) -> bool:
    if not is_sharded(a) or not is_sharded(b):
        return is_sharded(a) == is_sharded(b)
    return bool(a.placements == b.placements and a.device_mesh == b.device_mesh)  # type: ignore[attr-defined]


def sharded_dim(placement: Any) -> int | None:
    """The dimension that a placement cuts. `_StridedShard` is no subclass of `Shard`, and says that it is
    none.
    """
    dim = getattr(placement, "dim", None)
    return dim if isinstance(dim, int) else None


def placements_of(p: torch.Tensor, reduced: tuple[int, ...]) -> tuple[Any, ...]:
    """Where a tensor is that is a DTensor reduced over some dimensions: whole on all ranks that have other
    parts of these dimensions.
    """
    from torch.distributed.tensor import Replicate

    return tuple(
        Replicate() if sharded_dim(placement) in reduced else placement
        for placement in p.placements  # type: ignore[attr-defined]
    )


def placed_for(p: torch.Tensor, reduced: tuple[int, ...], value: torch.Tensor) -> bool:
    """Whether a state of `p` that is reduced over these dimensions lies where a step reads it."""
    if not is_sharded(p) or not is_sharded(value):
        return is_sharded(p) == is_sharded(value)
    same_mesh = value.device_mesh == p.device_mesh  # type: ignore[attr-defined]
    return bool(same_mesh and tuple(value.placements) == placements_of(p, reduced))  # type: ignore[attr-defined]


def reduced_shape(shape: tuple[int, ...], reduced: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(1 if d in reduced else size for d, size in enumerate(shape)) if reduced else shape


def zeros(p: torch.Tensor, reduced: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """As `p`, of size 1 in the dimensions that are reduced; of a DTensor a DTensor."""
    if not reduced:
        return torch.zeros_like(p, dtype=dtype, requires_grad=False)
    shape, part = (reduced_shape(tuple(t.shape), reduced) for t in (p, local(p)))
    own = torch.zeros(part, dtype=dtype, device=p.device)
    return _placed(p, placements_of(p, reduced), own, shape) if is_sharded(p) else own


def part_of(p: torch.Tensor, reduced: tuple[int, ...], whole: torch.Tensor) -> torch.Tensor:
    """A DTensor for a state of `p`, of which every rank has all numbers; no rank asks another."""
    mesh: Any = p.device_mesh  # type: ignore[attr-defined]
    placements, coordinate = placements_of(p, reduced), mesh.get_coordinate()
    part = whole.to(p.device)
    # where mesh dimensions cut the same one of the tensor, `_StridedShard` stands for a cut made last
    for k in sorted(range(mesh.ndim), key=lambda k: type(placements[k]).__name__ == "_StridedShard"):
        dim = sharded_dim(placements[k])
        if dim is not None:
            parts = part.chunk(mesh.size(k), dim)
            part = parts[coordinate[k]] if coordinate[k] < len(parts) else part.narrow(dim, 0, 0)
    return _placed(p, placements, part.contiguous(), tuple(whole.shape))


def _placed(
    p: torch.Tensor, placements: Sequence[Any], part: torch.Tensor, shape: tuple[int, ...]
) -> torch.Tensor:
    # torch takes every shard for as large as this one unless it is told, which is wrong where they are uneven
    strides = torch.empty(shape, device="meta").stride()
    mesh: Any = p.device_mesh  # type: ignore[attr-defined]
    kind: Any = dtensor_type()
    made: torch.Tensor = kind.from_local(
        part, mesh, placements, run_check=False, shape=torch.Size(shape), stride=strides
    )
    return made


def copied_dims(p: torch.Tensor) -> dict[int, Any]:
    """The mesh dimensions along which ranks have the same part of `p`, with their process groups; None where
    there is one rank.
    """
    if is_fake(local(p)):
        return {}
    mesh: Any = p.device_mesh  # type: ignore[attr-defined]
    return {
        k: mesh.get_group(k) if mesh.size(k) > 1 else None
        for k, placement in enumerate(p.placements)  # type: ignore[attr-defined]
        if sharded_dim(placement) is None
    }


def placed_alike(p: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """A DTensor whose part on this rank is given."""
    return _placed(p, p.placements, part, tuple(p.shape))  # type: ignore[attr-defined]


def groups_of(p: torch.Tensor, dims: Sequence[int]) -> tuple[Any, ...]:
    """The process groups of more than one rank whose ranks have other parts of a sum over dimensions.

    None for fake tensors, which have no numbers.
    """
    if not is_sharded(p) or is_fake(local(p)):
        return ()
    mesh: Any = p.device_mesh  # type: ignore[attr-defined]
    return tuple(
        mesh.get_group(k)
        for k, placement in enumerate(p.placements)  # type: ignore[attr-defined]
        if sharded_dim(placement) in dims and mesh.size(k) > 1
    )


def flattened_by(p: torch.Tensor) -> str | None:
    """Who keeps `p` as a flat piece of whole parameters, if its mark is on `p`.

    DeepSpeed's ZeRO stages 1 and 2 and Megatron's distributed optimizer leave none.
    """
    if getattr(
        p, "_fsdp_flattened", False
    ):  # with use_orig_params, the views of a flat parameter have it too
        return "FSDP1"
    return "ZeRO stage 3" if hasattr(p, "ds_id") else None


def refuse_pieces(optimizer: StepRule, group: dict[str, Any], name: str, p: torch.Tensor) -> None:
    """Raises ValueError if the step needs more of a parameter, or of all gradients, than `p` has here."""
    kind = type(optimizer).__name__
    lazy = optimizer.sparse_mode(group) is not None
    if is_sharded(p):
        return
    clips = optimizer.max_grad_norm is not None
    if clips and any(o is optimizer for o in getattr(p, "_in_backward_optimizers", ())):
        raise ValueError(
            f"{name}: max_grad_norm needs all gradients, an optimizer in the backward pass has those of one "
            "parameter; no norm over all can be taken there"
        )
    engine = flattened_by(p)
    if engine is None:
        return
    if optimizer.reduces or lazy:
        needs = "sums over whole tensors" if optimizer.reduces else "steps whole rows"
        raise ValueError(
            f"{name}: {kind} {needs}, {engine} gives each rank a flat piece; take DistributedDataParallel, "
            "which keeps parameters whole, or an element-wise rule"
        )
    if clips:
        instead = "FullyShardedDataParallel.clip_grad_norm_ before the step, or shard by fully_shard (FSDP2)"
        raise ValueError(
            f"{name}: max_grad_norm would be the norm of one rank's pieces, of {engine}; clip with "
            + (instead if engine == "FSDP1" else "DeepSpeed's gradient_clipping")
        )


def refuse_lost_shape(name: str, p: torch.Tensor, what: str, *, views: bool = True) -> None:
    """Raises ValueError if `p` does not have the shape that the module gave it.

    Without `views` only for what is put together of several parameters, of other names too.
    """
    engine = flattened_by(p) if views or getattr(p, "_is_flat_param", False) else None
    if engine is not None:
        raise ValueError(
            f"{name}: {engine} has flattened the parameter, {what}; make the groups before it does, "
            "for FSDP1 with use_orig_params=True"
        )
