"""Whether a CUDA graph is being captured, in which nothing may wait for the device."""

from __future__ import annotations

import torch


def is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and bool(torch.cuda.is_current_stream_capturing())
