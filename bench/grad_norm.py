"""The norm of all gradients: danlu's native pass against torch's, and against reading the same bytes.

    python bench/grad_norm.py          GPT-2 small in fp32, bf16 and fp16, some 20 seconds on 2 cores

Milliseconds are medians over the rounds with quartiles; shares compare turns of one round with a native loop
that reads as many bytes and does nothing else. Clipping by torch writes the gradients, too.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import torch

import danlu
from danlu import _cpu
from harness import Model, Spread, positive, time_steps
from workloads import Workload, gpt2_small

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def main(arguments: Sequence[str] | None = None, workload: Workload | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", metavar="N", type=positive, default=9, help="default: %(default)s")
    options = parser.parse_args(arguments)
    from rich.console import Console  # only here: a measurement on a GPU goes without
    from rich.table import Table

    shown = Table("gradients", "by", "ms", "of reading", title="Norm of all gradients")
    for dtype in DTYPES:
        for name, times, shares in measure(workload or gpt2_small(), dtype, options.rounds):
            ms = f"{times.median:.2f} ({times.low:.2f}-{times.high:.2f})"
            share = f"{shares.median:.0%} ({shares.low:.0%}-{shares.high:.0%})"
            shown.add_row(str(dtype).removeprefix("torch."), name, ms, share)
    Console().print(shown)


def measure(workload: Workload, dtype: torch.dtype, rounds: int) -> list[tuple[str, Spread, Spread]]:
    """Milliseconds of each way, and how much of the reading speed it reaches."""
    model = Model(workload, dtype)
    model.hold_gradients()
    ways = ways_to_norm(model)
    read = reading(model)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    ceilings = []
    for _ in range(rounds + 1):
        ceilings.append(time_steps(read, lambda: None, 3))
        for name, way in ways.items():
            seconds[name].append(time_steps(way, lambda: None, 3))
    return [
        (
            name,
            Spread.of([1e3 * t for t in times[1:]]),
            Spread.of([c / t for c, t in zip(ceilings[1:], times[1:], strict=True)]),
        )
        for name, times in seconds.items()
    ]


def ways_to_norm(model: Model) -> dict[str, Callable[[], object]]:
    gradients = [p.grad for p in model.parameters if p.grad is not None]
    return {
        "danlu, max_grad_norm": native_norm(model, "cpu"),
        "torch, get_total_norm": lambda: torch.nn.utils.get_total_norm(gradients),
        "torch, clip_grad_norm_": lambda: torch.nn.utils.clip_grad_norm_(model.parameters, 1e30),
    }


def native_norm(model: Model, backend: str) -> Callable[[], object]:
    """The pass of `max_grad_norm` alone: the squares of all gradients."""
    optimizer = danlu.Lion(model.parameters, lr=0.0, max_grad_norm=1.0, backend=backend)
    optimizer.step()
    assert optimizer._plan is not None
    (executor,) = optimizer._plan._executors
    executor.refresh(optimizer)
    return executor.gradient_squares


def reading(model: Model) -> Callable[[], object]:
    """One array of as many bytes as the gradients have."""
    size = sum(g.numel() * g.element_size() for g in model.gradients) // 4
    array = torch.ones(size)
    return lambda: _cpu.read_through(array.data_ptr(), size, torch.get_num_threads())


if __name__ == "__main__":
    main()
