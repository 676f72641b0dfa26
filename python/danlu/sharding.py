"""DTensors, without importing torch.distributed for those who do not use it."""

from __future__ import annotations

import sys

import torch


def dtensor_type() -> type | None:
    """DTensor, or None as long as nobody has imported it, when no tensor can be one."""
    module = sys.modules.get("torch.distributed.tensor")
    return None if module is None else getattr(module, "DTensor", None)


def is_sharded(t: torch.Tensor) -> bool:
    kind = dtensor_type()
    return kind is not None and isinstance(t, kind)


def local(t: torch.Tensor) -> torch.Tensor:
    """The shard of a DTensor that lives on this rank; any other tensor as it is."""
    return t._local_tensor if is_sharded(t) else t  # type: ignore[attr-defined]


def sharded_alike(a: torch.Tensor, b: torch.Tensor) -> bool:
    if not is_sharded(a) or not is_sharded(b):
        return is_sharded(a) == is_sharded(b)
    return bool(a.placements == b.placements and a.device_mesh == b.device_mesh)  # type: ignore[attr-defined]
