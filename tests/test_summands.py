"""Gradients of which ranks have summands, and what ranks see of one another's gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

import danlu
from danlu.backends import BACKENDS
from danlu.sharding import local
from emulated import Emulated
from meshes import run_on

MISSING = "gradients are missing on some ranks only"
MISPLACED = "the gradient is not sharded as the parameter is"


def on(mesh: DeviceMesh, part: torch.Tensor, *placements: Any) -> DTensor:
    return DTensor.from_local(part, mesh, placements, run_check=False)


def parameter(mesh: DeviceMesh, *placements: Any, size: int = 4) -> torch.nn.Parameter:
    return torch.nn.Parameter(on(mesh, torch.ones(size), *placements))


def raises(step: Callable[[], object], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        step()


def momentum(opt: Any, p: torch.Tensor) -> list[float]:
    found: list[float] = local(opt.state[p]["exp_avg"]).tolist()
    return found


def on_one_dimension(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2,))
    for backend in ("cpu", "reference"):
        # a gradient is no summand at first, and one later
        p = parameter(mesh, Replicate())
        opt: Any = danlu.AdamW([p], backend=backend)
        p.grad = torch.zeros_like(p)
        opt.step()
        p.grad = on(mesh, torch.ones(4), Partial())
        raises(opt.step, ValueError, MISPLACED)
        assert opt.state[p]["step"] == 1

        # averages; the sum of what ranks have, divided by their number
        p = parameter(mesh, Replicate())
        opt = danlu.AdamW([p], betas=(0.0, 0.9), backend=backend)
        p.grad = on(mesh, torch.full((4,), 3.0 + rank), Partial("avg"))
        opt.step()
        assert momentum(opt, p) == [3.5] * 4

        # the first gradient of a parameter comes later, on one rank only
        p, q = parameter(mesh, Replicate()), parameter(mesh, Shard(0))
        opt = danlu.AdamW([p, q], backend=backend)
        q.grad = torch.ones_like(q)
        opt.step()
        if rank == 0:
            p.grad = on(mesh, torch.ones(4), Partial())
        raises(opt.step, RuntimeError, MISSING)
        p.grad = on(mesh, torch.ones(4), Partial())
        opt.step()
        assert opt.state[p]["step"] == 1

        # one rank freezes something: no other is asked
        p, q = parameter(mesh, Replicate()), parameter(mesh, Shard(0))
        opt = danlu.AdamW([p, q], backend=backend)
        for t in range(2):
            p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
            if (rank, t) == (0, 1):
                q.requires_grad_(False)
            opt.step()

        # frozen after steps, with a gradient left
        for make in (danlu.LAMB, lambda ps, **e: danlu.AdamW(ps, max_grad_norm=1.0, **e)):
            p = parameter(mesh, Shard(0))
            opt = make([p], backend=backend)
            p.grad = torch.ones_like(p)
            opt.step()
            p.requires_grad_(False)
            raises(opt.step, ValueError, "its step needs other ranks, and it requires no gradient")
            p.grad = None
            opt.step()
            p.requires_grad_(True)
            p.grad = torch.ones_like(p)
            opt.step()
            assert opt.state[p]["step"] == 2


def test_on_one_dimension() -> None:
    run_on(2, on_one_dimension)


def on_two_dimensions(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    # what is placed otherwise is no summand, whatever else it is
    for placements in ((Partial(), Replicate()), (Partial(), Partial()), (Partial(), Shard(1))):
        p = torch.nn.Parameter(on(mesh, torch.ones(2, 4), Replicate(), Shard(0)))
        opt: Any = danlu.AdamW([p])
        p.grad = on(mesh, torch.ones(4, 2 if placements[1] == Shard(1) else 4), *placements)
        raises(opt.step, ValueError, MISPLACED)
    # half of the ranks, all of one group, have no gradient at first
    p = parameter(mesh, Shard(0), Replicate())
    opt = danlu.AdamW([p], betas=(0.0, 0.9))
    for t in range(2):
        p.grad = None if t == 0 and rank >= 2 else on(mesh, torch.ones(4), Shard(0), Partial())
        if t == 0:
            raises(opt.step, RuntimeError, MISSING)
        else:
            opt.step()
    assert momentum(opt, p) == [2.0] * 4


def test_on_two_dimensions() -> None:
    run_on(4, on_two_dimensions)


def test_on_a_mesh_of_one() -> None:
    run_on(1, on_a_mesh_of_one)


def on_a_mesh_of_one(rank: int) -> None:
    mesh = init_device_mesh("cpu", (1,))
    p = parameter(mesh, Replicate())
    opt: Any = danlu.AdamW([p], betas=(0.0, 0.9))
    p.grad = on(mesh, torch.ones(4), Partial())
    opt.step()
    assert momentum(opt, p) == [1.0] * 4


def late(rank: int) -> None:
    """Where no host waits, summands are back on all ranks when these hear that one has failed."""
    mesh = init_device_mesh("cpu", (2,))
    for backend in ("cpu", "cuda"):  # of which the first reads the host nevertheless
        p, q = parameter(mesh, Replicate()), parameter(mesh, Shard(0))
        opt: Any = danlu.AdamW([p, q], betas=(0.0, 0.9), backend=backend, capturable=True)
        p.grad = summand = on(mesh, torch.full((4,), 1.0 + rank), Partial())
        q.grad = on(mesh, torch.ones(8), Replicate()) if rank == 0 else torch.ones_like(q)
        if rank == 0:
            raises(opt.step, ValueError, MISPLACED)
        else:
            opt.step()
        q.grad = torch.ones_like(q)
        raises(opt.step, RuntimeError, "failed on another rank")
        assert p.grad is summand
        opt.step()
        assert momentum(opt, p) == [3.0] * 4
        assert (opt.state[p]["step"], opt.state[q]["step"]) == (1, 1)

        # infinities on one rank
        for make in (danlu.LAMB, danlu.AdamW):
            p = torch.nn.Parameter(on(mesh, torch.ones(4, 4), Shard(0)))
            opt = make(
                [p],
                backend=backend,
                capturable=True,
                **({"max_grad_norm": 1.0} if make is danlu.AdamW else {}),
            )
            p.grad = on(mesh, torch.full((4, 4), torch.inf if rank else 1.0), Shard(0))
            opt.found_inf, opt.grad_scale = torch.tensor(float(rank)), torch.tensor(1.0)
            opt.step()
            assert opt.state[p]["step"] == 0
            assert (local(p) == 1).all()


def test_summands_where_no_host_waits(cuda: Emulated) -> None:
    assert BACKENDS["cuda"] is cuda
    run_on(2, late)
