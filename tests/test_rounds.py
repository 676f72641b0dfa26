"""A step that stops where its sums are complete: two halves that add theirs step as the whole tensor does."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from cases import EVERY_REDUCING, Case, values
from danlu.plan import Plan
from danlu.scale import Scaling
from danlu.spec import Stop
from reductions import LAST_BIT, TOLERANCE, difference

STEPS = 2
# with a dimension and where it is cut; presets factor dimensions of 128 and more
CUTS = [
    *[((262, 264), 0, 131), ((262, 264), 1, 130), ((3, 130, 131), 0, 1), ((1001,), 0, 400), ((7, 5), 0, 2)],
    *[((33, 40), 0, 0), ((33, 40), 1, 40)],  # one part has nothing
]
# these look at a part's own shape for the dimensions that they factor
BY_SIZE = ("adafactor-optax", "adafactor-torch", "adafactor-big-vision", "adafactor-root")


def one(case: Case, p: torch.Tensor, backend: str) -> Any:
    return case.make([torch.nn.Parameter(p.clone().contiguous())], backend=backend)


def parameter(opt: Any) -> torch.nn.Parameter:
    (p,) = opt.param_groups[0]["params"]
    return p


@torch.no_grad()
def step_together(opts: list[Any], dim: int) -> int:
    """Steps parts of a tensor that was cut along a dimension; how often they stopped."""
    plans = [Plan(opt) for opt in opts]
    running = []
    for opt, plan in zip(opts, plans, strict=True):
        assert plan._refresh(opt)
        (executor,) = plan._executors
        (scale,) = plan._scales(Scaling.of(opt, None))
        executor.prepare(opt, scale)
        running.append(executor.rounds())
    stops = 0
    for found in itertools.zip_longest(*running):
        add_up(found, dim)
        stops += 1
    for plan in plans:
        for executor in plan._executors:
            executor.release()
    return stops


def add_up(stops: tuple[Stop, ...], dim: int) -> None:
    """Gives every part the sums of the whole."""
    for tensors in zip(*stops, strict=True):
        for parts in zip(*(sums for _, sums in tensors), strict=True):
            assert len({part.dims for part in parts}) == 1
            if dim not in parts[0].dims:
                continue
            total, count = sum(part.values for part in parts), sum(part.count for part in parts)
            for part in parts:
                part.values.copy_(total)
                part.count = count


def cut(x: torch.Tensor, dim: int, at: int) -> list[torch.Tensor]:
    return list(x.split([at, x.shape[dim] - at], dim))


def applies(case: Case, shape: tuple[int, ...]) -> bool:
    return len(shape) >= -min(case.hyper.get("reduce_dims", (0,)) or (0,))


@pytest.mark.pairs
@pytest.mark.parametrize(("shape", "dim", "at"), CUTS, ids=lambda x: str(x).replace(" ", ""))
@pytest.mark.parametrize("case", EVERY_REDUCING, ids=lambda c: c.id)
def test_two_halves_step_as_the_whole(
    case: Case, backend: str, shape: tuple[int, ...], dim: int, at: int
) -> None:
    check_two_halves(case, backend, shape, dim, at)


def check_two_halves(case: Case, backend: str, shape: tuple[int, ...], dim: int, at: int) -> None:
    if not applies(case, shape) or (at in (0, shape[dim]) and case.id.startswith(BY_SIZE)):
        return
    start = values(shape, 1, wild=False)
    whole = one(case, start, backend)
    parts = [one(case, piece, backend) for piece in cut(start, dim, at)]
    stops = set()
    for t in range(STEPS):
        g = values(shape, 10 + t, wild=False)
        parameter(whole).grad = g
        for opt, piece in zip(parts, cut(g, dim, at), strict=True):
            parameter(opt).grad = piece.contiguous()
        whole.step()
        stops.add(step_together(parts, dim))
    assert len(stops) == 1
    close(torch.cat([parameter(opt).detach() for opt in parts], dim), parameter(whole).detach(), "parameter")
    for key, want in whole.state[parameter(whole)].items():
        found = [opt.state[parameter(opt)][key] for opt in parts]
        if want.ndim <= dim or want.shape[dim] == 1:
            for x in found:
                close(x, want, key)
        else:
            close(torch.cat(found, dim), want, key)


def close(got: torch.Tensor, want: torch.Tensor, what: str) -> None:
    assert difference(got, want) < (TOLERANCE if want.dtype == torch.float32 else LAST_BIT), what


@pytest.mark.parametrize("case", EVERY_REDUCING, ids=lambda c: c.id)
def test_a_step_that_stops_has_the_bits_of_one_that_does_not(case: Case, backend: str) -> None:
    check_same_bits(case, backend)


def check_same_bits(case: Case, backend: str) -> None:
    """Where nobody changes its sums; several tensors go from stop to stop together."""
    # Triton's interpreter takes one row after the other where a rule takes each by itself
    few = case.id == "tiger-rows"
    shapes = [(14 if few else 140, 150), (7, 5), (3, 4 if few else 20, 30)]
    opts = [
        case.make(
            [torch.nn.Parameter(values(s, i, wild=False)) for i, s in enumerate(shapes)], backend=backend
        )
        for _ in range(2)
    ]
    for t in range(STEPS):
        for opt in opts:
            for i, p in enumerate(opt.param_groups[0]["params"]):
                p.grad = values(p.shape, 10 * t + i, wild=False)
        opts[0].step()
        step_together(opts[1:], 0)
    for p, q in zip(*(opt.param_groups[0]["params"] for opt in opts), strict=True):
        assert torch.equal(p, q)
        for key, want in opts[0].state[p].items():
            assert torch.equal(opts[1].state[q][key], want), key
