"""Lazy steps of an embedding on a GPU beside the step of all its rows."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

import cuda_harness
import danlu
import lazy_rows
from rounds import spread

SAMPLES = 5


def times(shape: tuple[int, int], listed: int, rounds: int) -> list[dict[str, Any]]:
    """Of each rule and each way to step: milliseconds until the GPU is done, which a lazy step waits for in
    between, and how many times as fast as all rows.
    """
    given = lazy_rows.gradients(shape, listed, cuda_harness.DEVICE)
    rows = []
    for optimizer in lazy_rows.OPTIMIZERS:
        p = torch.nn.Parameter(torch.ones(shape, device=cuda_harness.DEVICE))
        inner = optimizer([p])
        lazy, moments = danlu.Lazy(inner), danlu.Lazy(inner, "params")
        ways: dict[str, tuple[Callable[[], object], list[torch.Tensor]]] = {
            lazy_rows.ALL_ROWS: (inner.step, given["dense"]),
            "rows, listed": (lazy.step, given["listed"]),
            "rows, listed in no order": (lazy.step, given["in no order"]),
            "rows, listed twice": (lazy.step, given["twice"]),
            "rows, dense gradient": (lazy.step, given["dense"]),
            "params, listed": (moments.step, given["listed"]),
        }
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(rounds + 1):
            for name, (step, gradients) in ways.items():
                seconds[name].append(_seconds(step, p, gradients))
        all_rows = seconds[lazy_rows.ALL_ROWS][1:]
        for name, taken in seconds.items():
            ratios = (a / b for a, b in zip(all_rows, taken[1:], strict=True))
            ms = spread(1e3 * t for t in taken[1:])
            rows.append(dict(optimizer=optimizer.__name__, step=name, ms=ms, ratio=spread(ratios)))
        del inner, lazy, moments, p
        cuda_harness.free()
    return rows


def _seconds(step: Callable[[], object], p: torch.nn.Parameter, gradients: list[torch.Tensor]) -> float:
    samples = []
    p.grad = None
    for g in itertools.islice(itertools.cycle(gradients), SAMPLES + 1):  # the first makes a plan
        p.grad = g
        torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        torch.cuda.synchronize()
        samples.append(time.perf_counter() - start)
    return statistics.median(samples[1:])
