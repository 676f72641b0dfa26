"""Tables on their way to a device: sent when they change, through buffers that are free again."""

from __future__ import annotations

import pytest
import torch

from danlu.backends import staged_table
from danlu.backends.staged_table import StagedTable

CPU = torch.device("cpu")


def received(tensor: torch.Tensor, count: int) -> bytes:
    return bytes(tensor[:count].tolist())


def test_only_what_changed_is_sent() -> None:
    table = StagedTable(8, CPU)
    for data, sent in ((b"abcd", 1), (b"abcd", 1), (b"abce", 2), (b"abcd", 3), (b"ab", 4), (b"ab", 4)):
        assert received(table.send(data), len(data)) == data
        assert table.sent == sent


def test_a_buffer_is_waited_for_before_it_is_written_again(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, int, bytes]] = []

    class Watched(staged_table._Slot):
        def wait(self) -> None:
            calls.append(("wait", id(self), received(self.buffer, 1)))

        def mark(self, device: torch.device) -> None:
            calls.append(("mark", id(self), received(self.buffer, 1)))

    monkeypatch.setattr(staged_table, "_Slot", Watched)
    table = StagedTable(1, CPU, slots=3)
    for i in range(7):
        table.send(bytes([i]))
    waits, marks = calls[::2], calls[1::2]
    assert [kind for kind, _, _ in waits] == ["wait"] * 7
    assert [(kind, held) for kind, _, held in marks] == [("mark", bytes([i])) for i in range(7)]
    slots = [slot for _, slot, _ in waits]
    assert slots == [slot for _, slot, _ in marks]
    assert len(set(slots[:3])) == 3
    assert slots[3:6] == slots[:3]
    assert [held for _, _, held in waits[3:]] == [bytes([i]) for i in range(4)]  # untouched until then


def test_what_a_graph_reads_is_never_written_again() -> None:
    """A replay copies its buffer to its tensor once more, then the kernel reads it."""
    table = StagedTable(4, CPU)
    eager = table.send(b"eagr")
    first = table.send(b"one!", capturing=True)
    second = table.send(b"two!", capturing=True)
    assert received(eager, 4) == b"eagr"
    for i in range(5):
        table.send(bytes([i] * 4))
    third = table.send(b"3rd!", capturing=True)
    assert received(third, 4) == b"3rd!"
    assert [received(t, 4) for t in (first, second)] == [b"one!", b"two!"]
    assert [received(buffer, 4) for buffer, _ in table._captured] == [b"one!", b"two!", b"3rd!"]
    assert len({t.data_ptr() for pair in table._captured for t in pair} | {eager.data_ptr()}) == 7
