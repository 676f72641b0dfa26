"""Times of steps on processes of this machine, danlu's optimizers against torch's on the same shards.

Parameters are sharded by `fully_shard`. Each step has new DTensors as gradients, as FSDP2 makes them; their
numbers stay. A step lasts as long as its slowest rank takes, from a barrier on. The host's work is the CPU
time of one thread, in which waiting for other ranks does not count.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from rich.table import Table
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import danlu
import ranks
from harness import Spread
from workloads import Workload, gpt2_small, many_small, matrices

WORKLOADS = {workload.id: workload for workload in (gpt2_small(), many_small(), matrices())}
STEPS_PER_TURN = 2
HOST_RANKS = (1, 2)
Make = Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]


@dataclass(frozen=True)
class Contender:
    """clips: whether torch's `clip_grad_norm_` goes before each step."""

    name: str
    title: str
    make: Make
    clips: bool = False


TORCH_FUSED = functools.partial(torch.optim.AdamW, fused=True)
BASELINE = "torch-adamw"
CONTENDERS = {
    contender.name: contender
    for contender in (
        Contender(BASELINE, "torch.optim.AdamW (fused)", TORCH_FUSED),
        Contender(
            "torch-adamw-foreach",
            "torch.optim.AdamW (foreach)",
            functools.partial(torch.optim.AdamW, foreach=True),
        ),
        Contender("adamw", "danlu.AdamW", danlu.AdamW),
        Contender("adafactor", "danlu.Adafactor", danlu.Adafactor),
        Contender("lamb", "danlu.LAMB", danlu.LAMB),
        Contender("torch-adamw+norm", "torch.optim.AdamW (fused), clip_grad_norm_", TORCH_FUSED, clips=True),
        *(
            Contender(
                f"{kind.__name__.lower()}+norm",
                f"danlu.{kind.__name__}, max_grad_norm",
                functools.partial(kind, max_grad_norm=1.0),
            )
            for kind in (danlu.AdamW, danlu.Adafactor, danlu.LAMB)
        ),
    )
}


def measure(
    workload: Workload,
    contenders: Sequence[Contender],
    counts: Sequence[int],
    tensors: int,
    rounds: int,
    show: Callable[[str], object],
) -> dict[str, Any]:
    """Steps of a workload on each count of ranks, and the host's work for tiny tensors."""
    tiny = Workload("tiny", f"{tensors:,} tensors of 64 numbers", [(64,)] * tensors)
    found: dict[str, Any] = {"steps": [], "host": []}
    for key, of, on, clock in (
        ("steps", workload, counts, time.perf_counter),
        ("host", tiny, HOST_RANKS, time.thread_time),
    ):
        for count in on:
            show(f"{of.title}: ranks: {count}")
            rows = ranks.run_on(count, _on_a_rank, of, contenders, rounds, clock)
            found[key].append({"ranks": count, "tensors": len(of.shapes), "title": of.title, "rows": rows})
    return found


def _on_a_rank(
    workload: Workload, contenders: Sequence[Contender], rounds: int, clock: Callable[[], float]
) -> list[dict[str, Any]]:
    shards = Shards(workload)
    taken = [[_turn(contender, shards, clock) for contender in contenders] for _ in range(rounds + 1)]
    seconds = torch.tensor(taken)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    of_all = dict(zip((c.name for c in contenders), seconds[1:].T.tolist(), strict=True))
    rows = []
    for contender in contenders:
        own = of_all[contender.name]
        row = {
            "name": contender.name,
            "title": contender.title,
            "ms": vars(Spread.of([1e3 * t for t in own])),
        }
        for key, rival in (("ratio", BASELINE), ("ratio_to_clipped", f"{BASELINE}+norm")):
            if rival in of_all:
                pairs = zip(own, of_all[rival], strict=True)
                row[key] = vars(Spread.of([mine / its for mine, its in pairs]))
        rows.append({**row, **_counted(contender, shards)})
    return rows


class Shards:
    """Parameters as `fully_shard` leaves them, and their gradients."""

    def __init__(self, workload: Workload) -> None:
        generator = torch.Generator().manual_seed(0)
        holder = torch.nn.ParameterList(
            torch.nn.Parameter(torch.randn(shape, generator=generator).mul_(0.02))
            for shape in workload.shapes
        )
        # a module with a forward, which FSDP2 asks for
        module = torch.nn.Sequential()
        module.register_module("holder", holder)
        fully_shard(module, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
        self.parameters = list(module.parameters())
        self._module = module
        generator.manual_seed(dist.get_rank())
        self._gradients = [
            torch.randn(p.to_local().shape, generator=generator).mul_(1e-3) for p in self.parameters
        ]

    def give_gradients(self) -> None:
        for p, g in zip(self.parameters, self._gradients, strict=True):
            p.grad = DTensor.from_local(
                g, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride()
            )


def _stepper(contender: Contender, shards: Shards) -> Callable[[], object]:
    """A new optimizer whose state exists."""
    optimizer = contender.make(shards.parameters)

    def step() -> None:
        if contender.clips:
            torch.nn.utils.clip_grad_norm_(shards.parameters, 1.0)
        optimizer.step()

    shards.give_gradients()
    step()
    return step


def _turn(contender: Contender, shards: Shards, clock: Callable[[], float]) -> float:
    """Mean seconds of a step on this rank."""
    step, total = _stepper(contender, shards), 0.0
    for _ in range(STEPS_PER_TURN):
        shards.give_gradients()
        dist.barrier()
        start = clock()
        step()
        total += clock() - start
    return total / STEPS_PER_TURN


def _counted(contender: Contender, shards: Shards) -> dict[str, int | None]:
    """All-reduces of a step, their bytes, and how many DTensors torch has to look through for its operations.

    torch's clipping does not call `torch.distributed.all_reduce`.
    """
    step = _stepper(contender, shards)
    shards.give_gradients()
    with all_reduces() as sizes, DTensorArguments() as arguments:
        step()
    counted = None if contender.clips else len(sizes)
    total = None if contender.clips else sum(sizes)
    return {"all_reduces": counted, "bytes": total, "dtensor_arguments": arguments.count}


@contextmanager
def all_reduces() -> Iterator[list[int]]:
    """Collects the bytes of each."""
    sizes: list[int] = []
    original = dist.all_reduce

    def counting(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        sizes.append(tensor.nbytes)
        return original(tensor, *args, **kwargs)

    dist.all_reduce = counting
    try:
        yield sizes
    finally:
        dist.all_reduce = original


class DTensorArguments(TorchDispatchMode):
    """Counts DTensors among the arguments of operations, in lists too."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.count += sum(isinstance(leaf, DTensor) for leaf in tree_leaves((args, kwargs)))
        return func(*args, **kwargs)


def tables(results: dict[str, Any]) -> Iterator[Table]:
    for of in results["steps"]:
        shown = _table(
            f"Steps on {of['ranks']} ranks: {of['title']}", "ms", "all-\nreduces", "bytes of\na rank"
        )
        for row in of["rows"]:
            counted = ["" if row[key] is None else f"{row[key]:,}" for key in ("all_reduces", "bytes")]
            shown.add_row(row["title"], _spread(row["ms"], ".1f"), *counted, *_ratios(row))
        yield shown
    for of in results["host"]:
        title = f"The host's work, ranks: {of['ranks']}: {of['title']}"
        shown = _table(title, "us a tensor", "DTensors\ndispatched")
        for row in of["rows"]:
            each = {key: 1e3 * value / of["tensors"] for key, value in row["ms"].items()}
            arguments = f"{row['dtensor_arguments']:,}"
            shown.add_row(row["title"], _spread(each, ".1f"), arguments, *_ratios(row))
        yield shown


def _table(title: str, *headings: str) -> Table:
    shown = Table(title=title)
    shown.add_column("optimizer", overflow="fold")
    for heading in (*headings, "time, torch's\nfused = 1", "time, torch's fused\nand clipped = 1"):
        shown.add_column(heading, justify="right")
    return shown


def _ratios(row: dict[str, Any]) -> list[str]:
    clipped = row["name"].endswith("+norm")
    own = ["", "ratio_to_clipped"] if clipped else ["ratio", ""]
    return [_spread(row[key], ".2f") if key in row else "" for key in own]


def _spread(spread: dict[str, float], form: str) -> str:
    return f"{spread['median']:{form}} ({spread['low']:{form}}-{spread['high']:{form}})"
