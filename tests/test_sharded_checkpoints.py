"""Checkpoints of rules that sum go from any mesh to any other, to whole parameters, and back."""

from __future__ import annotations

import copy
import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

import danlu
from danlu.sharding import local
from danlu.testing import same_bits
from meshes import Layout, fsdp, full, give_gradients, hsdp, parameters, run_on, tp, tp_fsdp
from reductions import TOLERANCE, difference
from sharded_rules import RULES
from test_distributed_checkpoints import HAS_TITAN, titan

MESHES: dict[str, Callable[[], Layout]] = {"fsdp": fsdp, "hsdp": hsdp, "tp-fsdp": tp_fsdp}
SOME = ("adafactor-momentum", "adafactor-optax", "lamb", "amos", "tiger-cycle")
SAVED, END = 4, 6  # Tiger's cycle has begun anew
FULL = StateDictOptions(full_state_dict=True)


class Net(nn.Module):
    def __init__(self, layout: Layout | None, *, zero: bool = False) -> None:
        super().__init__()
        self.of = nn.ParameterDict(parameters(layout))
        if zero:
            for p in self.parameters():
                p.data.zero_()

    @property
    def named(self) -> dict[str, nn.Parameter]:
        return dict(self.of.items())


def made(name: str, layout: Layout | None, *, zero: bool = False) -> tuple[Net, Any]:
    net = Net(layout, zero=zero)
    return net, RULES[name][0](net.named)


def train(net: Net, opt: Any, steps: range, layout: Layout | None) -> None:
    for t in steps:
        give_gradients(net.named, t, layout)
        opt.step()
    opt.zero_grad()  # or torch's functions would not load


def wrong(net: Net, opt: Any, whole: Net, want: Any) -> list[str]:
    found = []
    for key, p in net.named.items():
        q = whole.named[key]
        for what, x, y in (
            ("parameter", p, q),
            *((k, held, want.state[q][k]) for k, held in opt.state[p].items()),
        ):
            if not difference(full(x).detach(), y.detach()) < TOLERANCE:
                found.append(f"{key} {what}")
    return found


def from_mesh_to_mesh(rank: int, folder: Path, names: tuple[str, ...]) -> None:
    faults = []
    for name in names:
        whole, want = made(name, None)
        train(whole, want, range(SAVED), None)
        early = {k: v.clone() for k, v in whole.state_dict().items()}, want.state_dict()
        path = folder / f"{name}.pt"
        if rank == 0:
            torch.save(early, path)
        dist.barrier()
        train(whole, want, range(SAVED, END), None)
        for place in MESHES:
            layout = MESHES[place]()
            net, opt = made(name, layout)
            train(net, opt, range(SAVED), layout)
            states = {"model": get_model_state_dict(net), "optimizer": get_optimizer_state_dict(net, opt)}
            dcp.save(states, checkpoint_id=folder / f"{name}-{place}")
            gathered = (
                get_model_state_dict(net, options=FULL),
                get_optimizer_state_dict(net, opt, options=FULL),
            )
            if rank == 0:
                torch.save(gathered, folder / f"{name}-{place}.pt")
            dist.barrier()
        for before, after in itertools.product(MESHES, repeat=2):
            layout = MESHES[after]()
            net, opt = made(name, layout, zero=True)
            states = {"model": get_model_state_dict(net), "optimizer": get_optimizer_state_dict(net, opt)}
            dcp.load(states, checkpoint_id=folder / f"{name}-{before}")
            set_model_state_dict(net, states["model"])
            set_optimizer_state_dict(net, opt, states["optimizer"])
            train(net, opt, range(SAVED, END), layout)
            faults += [(name, before, after, what) for what in wrong(net, opt, whole, want)]
            if after == "tp-fsdp":  # torch cannot distribute to _StridedShard
                continue
            net, opt = made(name, layout, zero=True)
            model, held = torch.load(folder / f"{name}-{before}.pt", weights_only=False)
            set_model_state_dict(net, model, options=FULL)
            set_optimizer_state_dict(net, opt, held, options=FULL)
            train(net, opt, range(SAVED, END), layout)
            faults += [(name, before, after, "full", what) for what in wrong(net, opt, whole, want)]
        for after in MESHES:  # what an unsharded run has saved, by torch.save alone
            layout = MESHES[after]()
            net, opt = made(name, layout)
            train(net, opt, range(SAVED), layout)
            for p in net.parameters():
                for held in opt.state[p].values():
                    held.zero_()
            opt.load_state_dict(torch.load(path, weights_only=False)[1])
            train(net, opt, range(SAVED, END), layout)
            faults += [(name, after, "plain", what) for what in wrong(net, opt, whole, want)]
        # and back into a process of one
        for before in MESHES:
            net, opt = made(name, None, zero=True)
            model, held = torch.load(folder / f"{name}-{before}.pt", weights_only=False)
            net.load_state_dict(model)
            set_optimizer_state_dict(net, opt, held)
            train(net, opt, range(SAVED, END), None)
            faults += [(name, before, "whole", what) for what in wrong(net, opt, whole, want)]
    assert not faults, faults


def saved(rank: int, folder: Path, name: str) -> None:
    layout = fsdp()
    net, opt = made(name, layout)
    train(net, opt, range(SAVED), layout)
    states = {"model": get_model_state_dict(net), "optimizer": get_optimizer_state_dict(net, opt)}
    dcp.save(states, checkpoint_id=folder)


def goes_on(rank: int, folder: Path, name: str) -> None:
    layout = fsdp()
    whole, want = made(name, None)
    train(whole, want, range(END), None)
    net, opt = made(name, layout, zero=True)
    states = {"model": get_model_state_dict(net), "optimizer": get_optimizer_state_dict(net, opt)}
    dcp.load(states, checkpoint_id=folder)
    set_model_state_dict(net, states["model"])
    set_optimizer_state_dict(net, opt, states["optimizer"])
    train(net, opt, range(SAVED, END), layout)
    assert not wrong(net, opt, whole, want)


@pytest.mark.parametrize(
    ("before", "after"),
    [(2, 4), *(pytest.param(*ranks, marks=pytest.mark.full) for ranks in ((4, 2), (2, 1), (1, 4)))],
)
@pytest.mark.parametrize(
    "name", [SOME[0], *(pytest.param(name, marks=pytest.mark.full) for name in SOME[1:])]
)
def test_on_another_number_of_ranks(name: str, before: int, after: int, tmp_path: Path) -> None:
    run_on(before, saved, tmp_path, name)
    run_on(after, goes_on, tmp_path, name)


def by_torchtitan(rank: int) -> None:
    """Its flat state dicts, which know parameters by their names."""
    for place in (fsdp, tp):
        layout = place()
        nets = [Net(layout), Net(layout, zero=True)]
        net, later = nets
        opt, loaded = (
            danlu.Adafactor(one.named.items(), lr=1e-2, beta1=0.9, relative_step=False) for one in nets
        )
        train(net, opt, range(SAVED), layout)
        flat = copy.deepcopy(titan.get_flat_optim_state_dict(opt))
        weights = get_model_state_dict(net)
        titan.init_optim_state(loaded)
        assert all(torch.all(full(p) == 0) for p in later.parameters())
        titan.load_flat_optim_state_dict(loaded, flat)
        set_model_state_dict(later, copy.deepcopy(weights))
        for one, its in ((net, opt), (later, loaded)):
            train(one, its, range(SAVED, END), layout)
        for p, q in zip(net.parameters(), later.parameters(), strict=True):
            assert same_bits(local(p).detach(), local(q).detach())
            for key, held in opt.state[p].items():
                assert same_bits(local(held), local(loaded.state[q][key])), key


def test_by_torchtitan() -> None:
    if not HAS_TITAN:
        assert not os.environ.get("CI"), "CI has Python 3.11 or newer"
        pytest.skip("torchtitan's wheels are for Python 3.11 and newer")
    run_on(2, by_torchtitan)


@pytest.mark.parametrize(
    "name", [SOME[0], *(pytest.param(name, marks=pytest.mark.full) for name in SOME[1:])]
)
def test_from_any_mesh_to_any_other(name: str, tmp_path: Path) -> None:
    run_on(4, from_mesh_to_mesh, tmp_path, (name,))
