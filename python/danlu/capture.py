"""Whether a CUDA graph is being captured, in which nothing may wait for the device."""

from __future__ import annotations

import torch


def is_capturing(device: torch.device) -> bool:
    # fake tensors may be on a device for which this torch is not built
    on_cuda = device.type == "cuda" and torch.backends.cuda.is_built()  # type: ignore[no-untyped-call]
    return on_cuda and bool(torch.cuda.is_current_stream_capturing())
