"""Whether a step is asked for the sake of the state that it makes."""

from __future__ import annotations

import sys
from types import FrameType

_MODULE = "torch.distributed.checkpoint.state_dict"
_FUNCTION = "_init_optim_state"


def is_asked_for_state() -> bool:
    """Whether the caller runs inside torch's distributed checkpoints, which want to know what state there is.

    Their `get_optimizer_state_dict` and `set_optimizer_state_dict` make the state of a new optimizer by a
    step with zeros as gradients and an lr of 0. Seen by that function's own frame on the stack, so that a
    step of a user is never taken for one. Walks over the whole stack: ask only where there is no state.
    """
    asking = getattr(getattr(sys.modules.get(_MODULE), _FUNCTION, None), "__code__", None)
    if asking is None:
        return False
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is asking:
            return True
        frame = frame.f_back
    return False
