"""Who called: what frameworks ask of an optimizer by an ordinary call that means something else."""

from __future__ import annotations

import sys
from types import FrameType

# Functions that make an optimizer's state by a step with an lr and gradients of zero, before a distributed
# checkpoint is written or read: torch.distributed.checkpoint's and torchtitan's
_MAKE_STATE = frozenset({"_init_optim_state", "init_optim_state"})
# Functions of both that read a state_dict for such a checkpoint
_READ_STATE = frozenset({"_get_optim_state_dict", "get_flat_optim_state_dict"})


def asks_for_state() -> bool:
    """Whether the running call of `step()` is to make the state and nothing else."""
    return _is_called_by(_MAKE_STATE)


def is_distributed_checkpoint() -> bool:
    """Whether the running call of `state_dict()` is for a distributed checkpoint.

    It is read by the keys that a new optimizer has: what that one does not have is lost.
    """
    return _is_called_by(_READ_STATE)


def _is_known(module: object) -> bool:
    return isinstance(module, str) and module.startswith(("torch.", "torchtitan."))


def _is_called_by(names: frozenset[str]) -> bool:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        # a function of yours may have the same name
        if frame.f_code.co_name in names and _is_known(frame.f_globals.get("__name__")):
            return True
        frame = frame.f_back
    return False
