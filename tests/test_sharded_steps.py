"""Sharded parameters step as whole ones, whatever the mesh: on four processes, and on two."""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Partial, Shard

import danlu
from danlu import sharded_step
from danlu.backends import BACKENDS
from danlu.part import Part
from danlu.sharding import copied_dims, groups_of, local
from danlu.state import COUNTERS
from danlu.testing import same_bits
from emulated import Emulated
from meshes import (
    Layout,
    experts,
    fsdp,
    full,
    give_gradients,
    gradient,
    hsdp,
    parameters,
    placed,
    run_on,
    tp,
    tp_fsdp,
)
from reductions import LAST_BIT, TOLERANCE, difference
from sharded_rules import LAZY, RULES

STEPS = 4
BOUNDS = {torch.float64: 1e-13, torch.float32: TOLERANCE, torch.bfloat16: LAST_BIT}
ASKED = {"float64": {"backend": "reference"}, "capturable": {"backend": "cuda", "capturable": True}}
# with the groups that a rank is in, each of which has an all-reduce of its own
MESHES: dict[str, tuple[int, Callable[[], Layout], int]] = {
    "fsdp-2": (2, fsdp, 1),
    "tp-2": (2, tp, 1),
    "fsdp-4": (4, fsdp, 1),
    "hsdp": (4, hsdp, 1),
    "tp-fsdp": (4, tp_fsdp, 2),
    "experts": (4, experts, 3),
}
# without --all: one of each kind of sum
SOME = ("adafactor-norm", "lamb-norm", "tiger-cycle")
EMULATED = ("adafactor-norm", "lamb-norm", "tiger")


@contextmanager
def counted() -> Iterator[list[int]]:
    """The sizes of the all-reduces, in numbers."""
    sizes: list[int] = []
    reduce = dist.all_reduce

    def all_reduce(x: torch.Tensor, *arguments: object, **options: object) -> object:
        sizes.append(x.numel())
        return reduce(x, *arguments, **options)  # type: ignore[arg-type]

    with mock.patch.object(dist, "all_reduce", all_reduce):
        yield sizes


def same_on_all_ranks(tensors: list[torch.Tensor]) -> bool:
    """To the bit."""
    own = hashlib.sha256(b"".join(t.contiguous().numpy().tobytes() for t in tensors)).hexdigest()
    found: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(found, own)
    return len({*found}) == 1


def asked_groups(params: Iterable[torch.Tensor]) -> int:
    """In which ranks ask for summands of gradients, once."""
    found: set[object] = set()
    for p in params:
        copies = {group for group in copied_dims(p).values() if group is not None}
        if copies:
            found |= {*copies, *groups_of(p, range(p.ndim))}
    return len(found)


def steps_as_the_whole(rank: int, place: Callable[[], Layout], groups: int, names: Collection[str]) -> None:
    layout = place()
    wrong = []
    for name, (make, all_reduces) in RULES.items():
        if name not in names:
            continue
        for backend in ("reference", "float64", "cpu", *(["cuda", "capturable"] if name in EMULATED else [])):
            dtype = torch.float64 if backend == "float64" else torch.float32
            params, wholes = parameters(layout, dtype), parameters(None, dtype)
            asked = ASKED.get(backend, {"backend": backend})
            opt, want = make(params, **asked), make(wholes, **asked)
            copies = asked_groups(params.values())
            for t in range(STEPS):
                give_gradients(params, t, layout)
                give_gradients(wholes, t)
                with counted() as sizes:
                    opt.step()
                want.step()
                # the first step compares what is exchanged, too, and asks for summands of gradients
                most = all_reduces + (t == 0 and all_reduces > 0)
                most += backend == "capturable" and name == "adafactor-norm"
                most = most * groups + (t == 0) * copies
                if len(sizes) > most or (groups == 1 and len(sizes) < most):
                    wrong.append((name, backend, t, "all-reduces", len(sizes), most))
            replicated = []
            for key, p in params.items():
                held, wanted = opt.state[p], want.state[wholes[key]]
                assert [*held] == [*wanted]
                pairs = [
                    ("parameter", p.detach(), wholes[key].detach()),
                    *((k, held[k], wanted[k]) for k in held),
                ]
                for what, x, y in pairs:
                    off = difference(full(x), y)
                    if not off < BOUNDS[y.dtype]:
                        wrong.append((name, backend, key, what, off))
                    replicated.append(full(x))
                    assert isinstance(x, DTensor) == (what not in COUNTERS)
            if not same_on_all_ranks(replicated):
                wrong.append((name, backend, "ranks differ"))
    assert not wrong, wrong


def meshes(*quick: str) -> pytest.MarkDecorator:
    """All, of which these are enough without --all."""
    params = [pytest.param(mesh, marks=() if mesh in quick else pytest.mark.full) for mesh in MESHES]
    return pytest.mark.parametrize("mesh", params)


@meshes("tp-fsdp", "experts")
def test_shards_step_as_the_whole(mesh: str, cuda: Emulated, pytestconfig: pytest.Config) -> None:
    ranks, place, groups = MESHES[mesh]
    assert BACKENDS["cuda"] is cuda
    names = RULES if pytestconfig.getoption("--all") else SOME
    run_on(ranks, steps_as_the_whole, place, groups, names)


def many_steps(rank: int) -> None:
    """The same bits again, and no step leaves anything behind."""
    layout = fsdp()
    opts = []
    for _ in range(2):
        params = parameters(layout)
        opts.append((RULES["adafactor-norm"][0](params, backend="cpu"), params))
    objects = []
    for t in range(100):
        for opt, params in opts:
            give_gradients(params, t % 5, layout)  # which the tests keep
            opt.step()
            opt.zero_grad()
        if t in (9, 99):
            gc.collect()
            objects.append(len(gc.get_objects()))
    assert objects[1] <= objects[0], objects
    (first, mine), (second, others) = opts
    for p, q in zip(mine.values(), others.values(), strict=True):
        assert same_bits(local(p).detach(), local(q).detach())
        for key, value in first.state[p].items():
            assert same_bits(local(value), local(second.state[q][key])), key


def test_many_steps() -> None:
    run_on(2, many_steps)


def norms(rank: int, place: Callable[[], Layout], groups: int) -> None:
    """Of gradients whose squares are infinite in fp32 until they are clipped, and of all sizes below."""
    layout = place()
    for backend in ("reference", "cpu", "cuda"):
        for scale, rounds in ((1e-3, 2), (1e6, 2), (1e15, 2), (1e25, 3)):
            params, wholes = parameters(layout), parameters()
            opt, want = (RULES["adafactor-norm"][0](those, backend=backend) for those in (params, wholes))
            for t in range(2):
                for those, made, at in ((params, opt, layout), (wholes, want, None)):
                    give_gradients(those, t, at)
                    for p in those.values():
                        p.grad.mul_(scale)  # type: ignore[union-attr]
                    with counted() as sizes:
                        made.step()
                    assert len(sizes) == (0 if at is None else (rounds + (t == 0)) * groups), (scale, sizes)
            for key, p in params.items():
                for x, y in (
                    (p, wholes[key]),
                    *((opt.state[p][k], want.state[wholes[key]][k]) for k in opt.state[p]),
                ):
                    assert y.isfinite().all()
                    assert difference(full(x).detach(), y.detach()) < TOLERANCE, (backend, scale, key)


def test_norms_go_with_the_first_sums(cuda: Emulated) -> None:
    run_on(2, norms, fsdp, 1)


def rows_take_part_on_all_ranks(rank: int, place: Callable[[], Layout]) -> None:
    """A row of zeros on one rank may have a gradient on another."""
    layout = place()
    wrong = []
    for name, make in LAZY.items():
        for backend in ("reference", "cpu", *(["cuda"] if name == "lazy-rows" else [])):
            if backend != "reference" and name == "lazy-layer":
                continue  # no kernel sums over a lazy parameter
            params, wholes = parameters(layout), parameters()
            opt, want = make(params, backend=backend), make(wholes, backend=backend)
            for t in range(STEPS):
                for key, p in params.items():
                    g = gradient(key, t)
                    if g.ndim > 1:
                        g[::2] = 0
                        g[0].view(-1)[t % g[0].numel()] = 1.0  # of one column alone
                    p.grad, wholes[key].grad = placed(g, *layout(key)), g
                with counted() as sizes:
                    opt.step()
                want.step()
                if not any(isinstance(at, Shard) and at.dim for key in params for at in layout(key)[1]):
                    asked = (t == 0) * asked_groups(params.values())
                    assert name == "lazy-layer" or len(sizes) == asked
            for key, p in params.items():
                for what, x, y in (
                    ("parameter", p.detach(), wholes[key].detach()),
                    *((k, held, want.state[wholes[key]][k]) for k, held in opt.state[p].items()),
                ):
                    same = (
                        difference(full(x), y) < TOLERANCE if name == "lazy-layer" else same_bits(full(x), y)
                    )
                    if not same:
                        wrong.append((name, backend, key, what))
    assert not wrong, wrong


@meshes("tp-2")
def test_rows_of_shards(mesh: str, cuda: Emulated) -> None:
    ranks, place, _ = MESHES[mesh]
    run_on(ranks, rows_take_part_on_all_ranks, place)


def summands(rank: int) -> None:
    """As a sequence-parallel norm's gradient, of which each rank has the sum over its tokens."""
    layout = tp()
    for name in ("adamw", "adamw-norm", "adafactor", "tiger"):
        params, wholes = parameters(layout), parameters()
        opt, want = RULES[name][0](params), RULES[name][0](wholes)
        for t in range(2):
            give_gradients(params, t, layout)
            give_gradients(wholes, t)
            for key in ("norm", "one"):
                g = gradient(key, t)
                part = 3 * g if rank == 0 else -2 * g
                params[key].grad = DTensor.from_local(part, layout(key)[0], [Partial()], run_check=False)
            with counted() as sizes:
                opt.step()
            want.step()
            # one for both gradients, one for the ranks' word; the first step asks, and compares
            assert len(sizes) == max(RULES[name][1], 1) + 1 + 2 * (t == 0), (name, sizes)
        for key, p in params.items():
            assert difference(full(p).detach(), wholes[key].detach()) < TOLERANCE, (name, key)


def a_late_summand(rank: int) -> None:
    """One rank lacks it: that is an error on all, and the others keep theirs."""
    layout = tp()
    params, wholes = parameters(layout), parameters()
    opt, want = RULES["adamw"][0](params), RULES["adamw"][0](wholes)
    for t in range(3):
        give_gradients(params, t, layout)
        give_gradients(wholes, t)
        if t == 0:  # of a parameter that nobody has used so far
            params["norm"].grad = wholes["norm"].grad = None
        else:
            g = gradient("norm", t) * (3 if rank == 0 else -2)
            summand = DTensor.from_local(g, layout("norm")[0], [Partial()], run_check=False)
            params["norm"].grad = summand
        if t == 2:
            before = [full(p).detach().clone() for p in params.values()]
            params["norm"].grad = summand if rank == 0 else None
            with pytest.raises(RuntimeError, match="missing on some ranks only"):
                opt.step()
            assert all(same_bits(x, full(p).detach()) for x, p in zip(before, params.values(), strict=True))
            if rank == 0:
                assert params["norm"].grad is summand
            params["norm"].grad = summand
        opt.step()
        want.step()
    for key, p in params.items():
        assert difference(full(p).detach(), wholes[key].detach()) < TOLERANCE, key


def test_summands_that_come_late_or_not_everywhere() -> None:
    run_on(2, a_late_summand)


def test_gradients_that_are_summands() -> None:
    run_on(2, summands)


def changes(rank: int) -> None:
    """Groups that sum at other stops, settings that change what is summed, parameters that thaw."""
    layout = fsdp()
    params, wholes = parameters(layout), parameters()
    plain = dict(clip_threshold=None, scale_parameter=False, relative_step=False, lr=1e-2)

    def make(those: dict[str, torch.nn.Parameter]) -> danlu.Adafactor:
        those["down"].requires_grad_(False)
        first, second = list(those.values())[:5], list(those.values())[5:]
        return danlu.Adafactor([{"params": first}, {"params": second, **plain}])

    opt, want = make(params), make(wholes)
    for t in range(5):
        for those, made, place in ((params, opt, layout), (wholes, want, None)):
            if t == 2:
                those["down"].requires_grad_(True)
            if t == 3:
                made.param_groups[0]["clip_threshold"], made.param_groups[1]["clip_threshold"] = None, 1.0
            give_gradients(those, t, place)
            if t < 2:
                those["down"].grad = None
            made.step()
    assert opt.state[params["down"]]["step"] == 3
    for key, p in params.items():
        assert difference(full(p).detach(), wholes[key].detach()) < TOLERANCE, key


def test_groups_and_settings_that_change() -> None:
    run_on(2, changes)


def an_untrained_gradient(rank: int) -> None:
    layout = fsdp()
    params = parameters(layout)
    params["down"].requires_grad_(False)
    opt = danlu.LAMB(params.items())
    give_gradients(params, 0, layout)  # of the frozen one, too
    with pytest.raises(ValueError, match=r"^down: its step needs other ranks, and it requires no gradient"):
        opt.step()
    with pytest.raises(ValueError, match=r"^parameters\[0\]: its step needs sums of other ranks"):
        Part(opt, [params["up"]])


def test_what_other_ranks_do_not_know_is_refused() -> None:
    run_on(2, an_untrained_gradient)


def captures(rank: int) -> None:
    layout = fsdp()
    params = parameters(layout)
    opt = danlu.LAMB(params.items())
    give_gradients(params, 0, layout)
    with (
        mock.patch.object(sharded_step, "is_capturing", return_value=True),
        pytest.raises(RuntimeError, match="cannot be captured"),
    ):
        opt.step()
    assert not opt.state


def test_no_graph_captures_a_step_with_other_ranks() -> None:
    run_on(2, captures)
