"""In which order a GPU runs what a step enqueues: passes that overlap, steps on several streams."""

from __future__ import annotations

import pytest
import torch

import danlu
from cases import EVERY_REDUCING, OTHER_LAYERED, REDUCING, Case
from danlu.backends import BACKENDS
from danlu.testing import same_bits
from training import all_same, copies, everything, parameters

TIMES = 10


def randoms(device: torch.device, *, matrices_alone: bool = False) -> list[torch.Tensor]:
    generator = torch.Generator(device).manual_seed(1)
    shapes: list[tuple[int, ...]] = [(70, 300), (3, 50, 21), (600, 7)]
    if device.type == "cuda":
        shapes += [(2048, 3000), (20_000, 210), (200, 9000)]
    if not matrices_alone:
        shapes += [(16_385,), (5,)]
    return [torch.randn(shape, generator=generator, device=device) for shape in shapes]


@pytest.mark.parametrize("case", EVERY_REDUCING + OTHER_LAYERED, ids=lambda c: c.id)
def test_passes_that_overlap_leave_the_same_bits(
    case: Case, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts = randoms(device, matrices_alone=case not in REDUCING)
    results = []
    for overlap in [False, *[True] * (TIMES if device.type == "cuda" else 1)]:
        monkeypatch.setattr(BACKENDS["cuda"], "dependent_launches", overlap)
        opt = case.make([torch.nn.Parameter(start.clone()) for start in starts], backend="cuda")
        for t in range(3):
            for p, start in zip(parameters(opt), starts, strict=True):
                p.grad = start.roll(t + 1)
            opt.step()
        results.append(copies(opt))
    assert all(all_same(result, results[0]) for result in results[1:])


@pytest.mark.parametrize("case", [REDUCING[1], REDUCING[5]], ids=lambda c: c.id)
def test_steps_on_streams_that_nobody_orders(case: Case, backend: str, gpu: torch.device) -> None:
    """Each over parameters of its own, so that only the plan's tables are common to them."""
    starts = randoms(gpu)
    opts = [case.make([torch.nn.Parameter(x.clone()) for x in starts], backend=backend) for _ in range(2)]
    for opt in opts:
        for p, start in zip(parameters(opt), starts, strict=True):
            p.grad = start.roll(1)
        opt.step()
    gradients = [[start.roll(t + 2) for start in starts] for t in range(8)]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    for opt, alternates in zip(opts, (False, True), strict=True):
        for t, of_step in enumerate(gradients):
            for i, (p, g) in enumerate(zip(parameters(opt), of_step, strict=True)):
                p.grad = g if i % 2 == t % 2 else None
            with torch.cuda.stream(streams[t % 2] if alternates else torch.cuda.current_stream()):
                torch.cuda._sleep(1_000_000)
                opt.step()
        torch.cuda.synchronize()
    assert all(map(same_bits, everything(opts[0]), everything(opts[1])))


def test_a_plan_that_is_dropped_while_another_stream_reads_its_tables(
    backend: str, gpu: torch.device
) -> None:
    """What is allocated next must not lie over them."""
    starts = randoms(gpu)
    results = []
    for late in (False, True):
        params = [torch.nn.Parameter(x.clone()) for x in starts]
        opt = danlu.Adafactor(params, lr=1e-3, backend=backend)
        for t in range(2):
            for p, start in zip(params, starts, strict=True):
                p.grad = start.roll(t + 1)
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream if t else torch.cuda.current_stream()):
                if late and t:
                    torch.cuda._sleep(50_000_000)
                opt.step()
        opt._plan = None
        rubbish = [torch.full((2**k,), -1, dtype=torch.uint8, device=gpu) for k in range(9, 26)]
        torch.cuda.synchronize()
        del rubbish
        results.append([p.detach() for p in params])
    assert all(map(same_bits, *results))
