"""Parameters of which each rank has a part: DTensors, and flat pieces that look like plain tensors.

Nothing here imports torch.distributed, for those who do not use it.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

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


def sharded_alike(a: torch.Tensor, b: torch.Tensor) -> bool:
    if not is_sharded(a) or not is_sharded(b):
        return is_sharded(a) == is_sharded(b)
    return bool(a.placements == b.placements and a.device_mesh == b.device_mesh)  # type: ignore[attr-defined]


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
        if optimizer.reduces or lazy:
            needs = "sums over whole tensors" if optimizer.reduces else "steps whole rows"
            raise ValueError(f"{name}: {kind} {needs} and takes no DTensor")
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
