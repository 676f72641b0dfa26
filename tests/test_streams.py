"""Tables that kernels read stay for every stream that a plan is stepped on, and steps keep their order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

import danlu
from cases import values
from danlu import capture
from danlu.backends import streams, triton
from danlu.backends.gpu import GpuExecutor
from danlu.backends.staged_table import StagedTable
from danlu.spec import ParamSpec
from emulated import Emulated
from training import give_gradients

# what a step makes anew on its own stream, is the user's, or is the host's
OTHERS = {
    "_part",
    "_clip",
    "_found_inf",
    "_step_increments",
    "_micro_increments",
    "_listed",
    "_params",
    "_steps",
}
HOST = {"_ring", "_for_capture", "_captured"}


def memory(table: torch.Tensor) -> int:
    return table.untyped_storage()._cdata  # type: ignore[attr-defined,no-any-return]


@dataclass(eq=False)
class Stream:
    """One of torch's, and what it waited for."""

    cuda_stream: int = 17  # 0: the default one
    alive: bool = True
    waited: list[Stream] = field(default_factory=list)

    def wait_stream(self, other: Stream) -> None:
        assert other.alive
        self.waited.append(other)

    def wait_event(self, event: Event) -> None:
        assert event.stream is not None
        self.waited.append(event.stream)


class Event:
    """One of torch's: the stream behind whose work it is."""

    stream: Stream | None = None

    def record(self, stream: Stream) -> None:
        assert stream.alive
        self.stream = stream


class Streams:
    """Stands for torch's: the current one, and which tables were recorded on which."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.first = self.current = Stream(cuda_stream=0)
        self.recorded: Counter[tuple[Stream, int]] = Counter()

        def record_stream(table: torch.Tensor, stream: Stream) -> None:
            self.recorded[stream, memory(table)] += 1

        monkeypatch.setattr(streams, "current_stream", lambda device: self.current)
        monkeypatch.setattr(streams, "new_event", Event)
        monkeypatch.setattr(torch.Tensor, "record_stream", record_stream)

    def tables(self, stream: Stream) -> set[int]:
        return {table for of, table in self.recorded if of is stream}


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Streams:
    return Streams(monkeypatch)


@pytest.fixture(params=["cuda", "triton"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Triton's launches are left out: what they read is made all the same."""
    if request.param == "cuda":
        request.getfixturevalue("cuda")
        return "cuda"

    def launch(executor: Any) -> None:
        if executor._on_device is None:
            executor.coefficient_table()
        executor._native.advance()

    monkeypatch.setattr(triton.Triton, "device_types", ("cpu",))
    monkeypatch.setattr(triton.Triton, "unavailable", lambda self: None)
    monkeypatch.setattr(triton.TritonExecutor, "launch", launch)
    monkeypatch.setattr(triton.TritonExecutor, "enqueue_norm", lambda *arguments: None)
    return "triton"


def kept(found: Any) -> Iterator[torch.Tensor]:
    """The tensors that an object of a plan holds for its kernels."""
    if isinstance(found, torch.Tensor):
        yield found
    elif isinstance(found, dict):
        yield from (t for value in found.values() for t in kept(value))
    elif isinstance(found, (list, tuple)):
        yield from (t for value in found for t in kept(value))
    elif type(found).__module__.startswith("danlu.backends") and not isinstance(found, streams.Streams):
        left_out = HOST if isinstance(found, StagedTable) else OTHERS
        yield from (t for name, value in vars(found).items() if name not in left_out for t in kept(value))


def tables_of(opt: danlu.FusedOptimizer) -> set[int]:
    assert opt._plan is not None
    (executor,) = opt._plan._executors
    assert isinstance(executor, GpuExecutor)
    assert not any(isinstance(spec, GpuExecutor) for spec in executor._specs)
    assert isinstance(executor._specs[0], ParamSpec)
    states = {memory(value) for state in opt.state.values() for value in state.values()}
    return {memory(t) for t in kept(executor)} - states


def lazy_and_not(params: list[torch.nn.Parameter]) -> list[dict[str, Any]]:
    return [{"params": params[:1], "lazy": True}, {"params": params[1:]}]


MAKERS = {
    "element-wise": lambda params, **o: danlu.AdamW(params, **o),
    "reducing": lambda params, **o: danlu.Adafactor(params, lr=1e-3, **o),
    "norm": lambda params, **o: danlu.LAMB(params, max_grad_norm=1.0, **o),
    "capturable": lambda params, **o: danlu.Tiger(params, accumulation_steps=2, capturable=True, **o),
    "capturable reducing": lambda params, **o: danlu.Amos(params, lr=1e-2, capturable=True, **o),
    "lazy": lambda params, **o: danlu.Lazy(danlu.AdamW(lazy_and_not(params), **o), mode="params"),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_all_tables_are_recorded_once_for_each_new_stream(make: Any, backend: str, fake: Streams) -> None:
    params = [torch.nn.Parameter(values((9, 8 + i), i, wild=False)) for i in range(3)]
    opt = make(params, backend=backend)
    others = [Stream(), Stream()]
    for t, stream in enumerate((fake.first, fake.first, others[0], others[0], fake.first, *others, *others)):
        fake.current = stream
        give_gradients(params, t)
        opt.step()
        if stream is fake.first:
            assert not fake.tables(fake.first)  # where they were allocated
    inner = getattr(opt, "inner", opt)
    for stream in others:
        assert fake.tables(stream) == tables_of(inner)
    assert set(fake.recorded.values()) == {1}
    first, second = others
    assert first.waited == [fake.first, fake.first, second]
    assert fake.first.waited == [first]
    assert second.waited == [first, first]


def test_a_table_that_is_made_later_is_recorded_for_the_streams_before(fake: Streams) -> None:
    use = streams.Streams(torch.device("cpu"))
    fake.current = other = Stream()
    use.enter()
    later = torch.zeros(3)
    use.keep(later)
    assert fake.tables(fake.first) == {memory(later)}
    assert not fake.tables(other)
    fake.current = third = Stream()
    use.enter()
    assert fake.tables(third) == {memory(later)}


def test_a_stream_may_be_gone_by_the_next_step(cuda: Emulated, fake: Streams) -> None:
    """The next one waits for what it has done, and asks it for nothing."""
    params = [torch.nn.Parameter(values((9, 8), 0, wild=False))]
    opt = danlu.LAMB(params, backend="cuda")
    fake.current = gone = Stream()  # the plan is made there, too
    for t in range(2):
        give_gradients(params, t)
        opt.step()
    gone.alive = False
    fake.current = fake.first
    opt.step()
    assert fake.first.waited == [gone]
    opt.step()
    assert fake.first.waited == [gone]
    fake.current = other = Stream()
    opt.step()
    assert other.waited == [fake.first]


def test_a_capture_records_and_waits_for_nothing(
    cuda: Emulated, fake: Streams, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It could not wait for a stream outside."""
    params = [torch.nn.Parameter(values((9, 8), 0, wild=False))]
    opt = danlu.AdamW(params, backend="cuda", capturable=True)
    give_gradients(params, 0)
    opt.step()
    fake.current = capturing = Stream()
    with monkeypatch.context() as patch:
        patch.setattr(capture, "is_capturing", lambda device: True)
        opt.step()
    assert not fake.recorded
    assert not capturing.waited
    fake.current = fake.first
    opt.step()
    assert not fake.first.waited


def test_one_stream_asks_for_nothing(cuda: Emulated, fake: Streams) -> None:
    params = [torch.nn.Parameter(values((9, 8), 0, wild=False))]
    opt = danlu.Adafactor(params, lr=1e-3, backend="cuda")
    for t in range(3):
        give_gradients(params, t)
        opt.step()
    assert not fake.recorded
    assert not fake.first.waited
