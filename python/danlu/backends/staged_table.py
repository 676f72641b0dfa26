"""Tables that kernels read, kept equal to bytes on the host."""

from __future__ import annotations

import ctypes

import torch


class StagedTable:
    """A tensor on a device, sent again only when its bytes change.

    The bytes travel through a ring of pinned buffers, each with an event that tells when it may be written
    again. A graph that is being captured gets a buffer and a tensor of its own, since a replay reads both
    again.
    """

    def __init__(self, nbytes: int, device: torch.device, slots: int = 3) -> None:
        self._device = device
        self._pinned = device.type == "cuda"
        self._tensor = torch.empty(nbytes, dtype=torch.uint8, device=device)
        self._last: bytes | None = None
        self._ring = [_Slot(nbytes, self._pinned) for _ in range(slots)]
        self._next = 0
        self._for_capture: torch.Tensor | None = self._buffer()
        self._captured: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.sent = 0

    @property
    def table(self) -> torch.Tensor:
        """What `send` gives outside of a capture."""
        return self._tensor

    def send(self, data: bytes, *, capturing: bool = False) -> torch.Tensor:
        """A tensor of bytes on the device that starts with `data` when kernels enqueued after this run."""
        if capturing:
            return self._send_in_capture(data)
        if self._for_capture is None:  # ahead of the next capture, which had better allocate nothing pinned
            self._for_capture = self._buffer()
        if data != self._last:
            slot = self._ring[self._next]
            self._next = (self._next + 1) % len(self._ring)
            slot.wait()
            _copy(data, slot.buffer)
            self._tensor[: len(data)].copy_(slot.buffer[: len(data)], non_blocking=True)
            slot.mark(self._device)
            self._last = data
            self.sent += 1
        return self._tensor

    def _send_in_capture(self, data: bytes) -> torch.Tensor:
        buffer = self._buffer() if self._for_capture is None else self._for_capture
        self._for_capture = None
        tensor = torch.empty_like(self._tensor)
        _copy(data, buffer)
        tensor[: len(data)].copy_(buffer[: len(data)], non_blocking=True)
        self._captured.append((buffer, tensor))
        return tensor

    def _buffer(self) -> torch.Tensor:
        return _host_bytes(self._tensor.numel(), self._pinned)


class _Slot:
    def __init__(self, nbytes: int, pinned: bool) -> None:
        self.buffer = _host_bytes(nbytes, pinned)
        self._event = torch.cuda.Event() if pinned else None  # type: ignore[no-untyped-call]
        self._used = False

    def wait(self) -> None:
        if self._event is not None and self._used:
            self._event.synchronize()

    def mark(self, device: torch.device) -> None:
        if self._event is not None:
            self._event.record(torch.cuda.current_stream(device))
            self._used = True


def _host_bytes(count: int, pinned: bool) -> torch.Tensor:
    return torch.empty(count, dtype=torch.uint8, device="cpu", pin_memory=pinned)


def _copy(data: bytes, buffer: torch.Tensor) -> None:
    ctypes.memmove(buffer.data_ptr(), data, len(data))
