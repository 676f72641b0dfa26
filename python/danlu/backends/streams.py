"""Which streams read the tables of a plan."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from .. import capture


class Streams:
    """Keeps tables for every stream on which a plan is stepped, and its steps in their order.

    torch's allocator knows the stream on which memory was allocated: another one may still read a table when
    it is freed, or written again. So a stream is recorded with the tables when it takes its first step, and
    where a step is on another stream than the one before, its stream waits for that. A step inside a capture
    does neither: the optimizer keeps the plan of a captured step as long as it lives itself.

    No stream is asked for anything later, since its owner may have destroyed it: an event behind each step
    stands for it. The default stream, which nobody destroys, needs none.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._tables: dict[int, torch.Tensor] = {}
        self._last = current_stream(device)
        self._known = {self._last}
        self._entered = False
        self._done: torch.cuda.Event | None = None  # behind the last step, unless on the default stream

    def keep(self, *tables: torch.Tensor) -> None:
        """Takes tables that were allocated on the current stream."""
        new = {id(table): table for table in tables}  # a table may serve several passes
        self._tables.update(new)
        if len(self._known) > 1:
            for stream in self._known - {current_stream(self._device)}:
                _record(new.values(), stream)

    def enter(self) -> None:
        """To be called before a step enqueues or writes anything."""
        stream = current_stream(self._device)
        if stream is None or capture.is_capturing(self._device):
            return
        self._entered = True
        if stream == self._last:
            return
        if self._done is not None:
            stream.wait_event(self._done)
        elif self._last is not None:
            stream.wait_stream(self._last)
        if stream not in self._known:
            self._known.add(stream)
            _record(self._tables.values(), stream)
        self._last = stream

    def leave(self) -> None:
        """To be called when all of a step is enqueued."""
        if not self._entered or self._last is None:
            return
        self._entered = False
        if self._last.cuda_stream == 0:
            self._done = None
            return
        if self._done is None:
            self._done = new_event()
        self._done.record(self._last)


def current_stream(device: torch.device) -> torch.cuda.Stream | None:
    """The stream of torch's on which kernels are enqueued now; None where there are none."""
    return torch.cuda.current_stream(device) if device.type == "cuda" else None


def new_event() -> torch.cuda.Event:
    return torch.cuda.Event()  # type: ignore[no-untyped-call]


def _record(tables: Iterable[torch.Tensor], stream: torch.cuda.Stream | None) -> None:
    if stream is not None:
        for table in tables:
            table.record_stream(stream)
