"""FSDP2, distributed checkpoints and `plain_shards`, on two processes: shards step as the whole would."""

from __future__ import annotations

import datetime
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate

import danlu
import plain_shards
from cases import CASES, Case, values
from danlu.testing import same_bits
from wrapped import WRAPPERS

RANKS = 2
WITHOUT_ROWS = 1  # the rank that has none of a parameter with one row
PATIENCE = datetime.timedelta(seconds=30)  # for a rank whose check failed before it met the other


chosen = plain_shards.SOME  # as `work` says


def net(seed: int = 0) -> nn.Module:
    """Parameters of 5 rows and of one, which two ranks cannot share evenly, and of none to share."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4, bias=False), nn.Tanh(), nn.Linear(4, 1))


def sharded_net(seed: int = 0) -> nn.Module:
    model = net(seed)
    fully_shard(model[0])
    return fully_shard(model)  # type: ignore[no-any-return]


def backward(model: nn.Module, t: int) -> None:
    model.zero_grad()
    model(values((6, 3), t, wild=False)).square().sum().backward()


def go(model: nn.Module, opt: torch.optim.Optimizer, steps: range) -> None:
    for t in steps:
        backward(model, t)
        opt.step()


def full(t: torch.Tensor) -> torch.Tensor:
    return t.full_tensor() if isinstance(t, DTensor) else t


def everything(opt: torch.optim.Optimizer) -> list[torch.Tensor]:
    params = [p for group in opt.param_groups for p in group["params"]]
    return [full(t).detach() for p in params for t in (p, *opt.state[p].values())]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(map(same_bits, a, b))


def shards_step_as_the_whole(rank: int, folder: Path) -> None:
    for case in chosen:
        model, whole = sharded_net(), net()
        opt, expected = case.make(model.parameters()), case.make(whole.parameters())
        go(model, opt, range(4))
        go(whole, expected, range(4))
        assert same(everything(opt), everything(expected)), case.id
        assert {row.backend for row in opt.backend_report()} == {"cpu"}
        rows = [p.to_local().shape[0] for p in model.parameters()]
        assert (0 in rows) == (rank == WITHOUT_ROWS)
        for p in model.parameters():
            m = opt.state[p]["exp_avg"]
            assert isinstance(m, DTensor)
            assert m.placements == p.placements
            assert m.to_local().shape == p.to_local().shape
            assert opt.state[p]["step"].item() == expected.state[next(whole.parameters())]["step"]


def the_norm_is_that_of_all_shards(rank: int, folder: Path) -> None:
    model, whole = sharded_net(), net()
    opt = danlu.AdamW(model.parameters(), max_grad_norm=0.1)
    expected = danlu.AdamW(whole.parameters(), max_grad_norm=0.1)
    go(model, opt, range(4))
    go(whole, expected, range(4))
    for a, b in zip(everything(opt), everything(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


def saved_shards_go_on(rank: int, folder: Path) -> None:
    for case in chosen:
        model = sharded_net()
        opt = case.make(model.parameters())
        go(model, opt, range(4))
        states = dict(zip(("model", "optimizer"), get_state_dict(model, opt), strict=True))
        dcp.save(states, checkpoint_id=folder / case.id)

        other = sharded_net(seed=1)
        loaded = case.make(other.parameters())
        load(other, loaded, folder / case.id)
        assert same(everything(loaded), everything(opt)), case.id
        go(model, opt, range(4, 9))
        go(other, loaded, range(4, 9))
        assert same(everything(loaded), everything(opt)), case.id
        result = everything(opt)
        if rank == 0:
            torch.save(result, folder / f"{case.id}.pt")


def asked_for_their_state_shards_count_nothing(rank: int, folder: Path) -> None:
    for case in chosen:
        (model, opt), (other, expected) = (
            (m, case.make(m.parameters())) for m in (sharded_net(), sharded_net())
        )
        states = get_optimizer_state_dict(model, opt)["state"]
        for name, p in model.named_parameters():
            moment = states[name]["exp_avg"]
            assert isinstance(moment, DTensor)
            assert moment.placements == p.placements
            assert opt.state[p]["step"] == 0
        go(model, opt, range(4))
        go(other, expected, range(4))
        assert same(everything(opt), everything(expected)), case.id


def gradients_of_shards_may_lie_otherwise(rank: int, folder: Path) -> None:
    model, other = sharded_net(), sharded_net()
    opt, expected = danlu.AdamW(model.parameters()), danlu.AdamW(other.parameters())
    plans = set()
    for t in range(4):
        backward(model, t)
        backward(other, t)
        for p in model.parameters() if t % 2 else ():
            g = p.grad
            assert isinstance(g, DTensor)
            if g.ndim == 2:
                shard = g.to_local().t().contiguous().t()
                shape, stride = g.shape, (1, g.shape[0])
                p.grad = DTensor.from_local(shard, g.device_mesh, g.placements, shape=shape, stride=stride)
        opt.step()
        expected.step()
        plans.add(opt._plan)
    assert len(plans) == 1
    assert same(everything(opt), everything(expected))


def a_part_is_refused_where_a_state_is_needed(rank: int, folder: Path) -> None:
    model = sharded_net()
    opt = danlu.AdamW(model.named_parameters())
    go(model, opt, range(2))
    before = everything(opt)
    saved = opt.state_dict()
    saved["state"] = {key: dict(held) for key, held in saved["state"].items()}
    saved["state"][0]["exp_avg"] = saved["state"][0]["exp_avg"].to_local()
    with pytest.raises(ValueError, match=r"0\.weight: state 'exp_avg' (is not sharded|has shape)"):
        opt.load_state_dict(saved)
    assert same(everything(opt), before)
    go(model, opt, range(2, 3))


def nothing_piles_up(rank: int, folder: Path) -> None:
    model = sharded_net()
    opt = danlu.AdamW(model.parameters())
    counts = []
    for repeated in (1, 5):  # the same numbers: what makes them keeps them
        for _ in range(repeated):
            go(model, opt, range(20))
        opt.zero_grad()
        gc.collect()
        counts.append(len(gc.get_objects()))
    assert counts[1] <= counts[0] + 20, counts


def what_is_placed_otherwise_is_named(rank: int, folder: Path) -> None:
    """State as plain shards would be saved without an error, and wrong; whole states come from a file."""

    def gradient(opt: danlu.Lion, p: torch.Tensor) -> None:
        assert isinstance(p.grad, DTensor)
        p.grad = p.grad.redistribute(placements=[Replicate()])

    def state(change: Callable[[DTensor], torch.Tensor]) -> Callable[[danlu.Lion, torch.Tensor], None]:
        def placed(opt: danlu.Lion, p: torch.Tensor) -> None:
            opt.state[p]["exp_avg"] = change(opt.state[p]["exp_avg"])

        return placed

    changes = {
        "gradient on every rank": gradient,
        "state on every rank": state(lambda m: m.redistribute(placements=[Replicate()])),
        "state as a plain shard": state(lambda m: m.to_local()),
        "state as a plain whole": state(lambda m: m.full_tensor()),
    }
    wrong = {}
    for what, change in changes.items():
        model = sharded_net()
        opt = danlu.Lion(model.named_parameters())
        go(model, opt, range(2))
        backward(model, 2)
        names, params = zip(*model.named_parameters(), strict=True)
        p = params[names.index("2.weight")]
        others = [q for q in params if q is not p]
        change(opt, p)
        before = [full(q).clone() for q in others]
        try:
            opt.step()
            wrong[what] = "no error"
        except Exception as error:
            if not isinstance(error, TypeError | ValueError) or "2.weight" not in str(error):
                wrong[what] = repr(error)
        if not same([full(q) for q in others], before):
            wrong[what] = f"{wrong.get(what)}, and others were stepped"
    assert not wrong, wrong


def plain(params: Any) -> torch.optim.Optimizer:
    return danlu.AdamW(params, lr=2e-2, weight_decay=0.1)


def torchs(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=2e-2, foreach=False)


# where in a cycle a wrapper is saved: its first one, the end of one, the next one
SAVED = [
    (f"{make.__name__}-{wrapping.id}-{steps}", make, wrapping, steps)
    for wrapping in WRAPPERS
    for make, places in ((plain, (1, wrapping.period, wrapping.period + 1)), (torchs, (1,)))
    for steps in dict.fromkeys(places)
]
# without --all: a first cycle and a later one
SOMEWHERE = [
    case for case in SAVED if case[3] in (1, case[2].period + 1) and (case[1] is plain or case[2].period == 1)
]


def saved(opt: Any) -> list[torch.Tensor]:
    """Parameters, states of the optimizer and of all wrappers around it, counters included."""
    states = opt.state_dict()["state"]
    found = [full(p).detach().clone() for group in opt.param_groups for p in group["params"]]
    return found + [full(states[i][key]).clone() for i in sorted(states) for key in sorted(states[i])]


def wrappers_go_on(rank: int, folder: Path) -> None:
    """Saved anywhere in a cycle, the first one included; saving changes nothing."""
    for name, make, wrapping, steps in SAVED if chosen is CASES else SOMEWHERE:
        undisturbed, model, other = sharded_net(), sharded_net(), sharded_net(seed=1)
        expected, opt, loaded = (wrapping.make(make(m.parameters())) for m in (undisturbed, model, other))
        go(undisturbed, expected, range(steps))
        go(model, opt, range(steps))
        model.zero_grad()
        states = {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, opt)}
        dcp.save(states, checkpoint_id=folder / name)
        load_wrapped(other, loaded, folder / name)
        assert same(saved(loaded), saved(opt)), name
        for m, o in ((undisturbed, expected), (model, opt), (other, loaded)):
            go(m, o, range(steps, steps + wrapping.period + 1))
        assert same(saved(loaded), saved(opt)), name
        assert same(saved(expected), saved(opt)), name
        result = saved(opt)
        if rank == 0:
            torch.save(result, folder / f"{name}.pt")


def weights_change_places(rank: int, folder: Path) -> None:
    """Averages and slow weights stand in the shards' own place, as in one process, and go again."""
    batch = values((6, 3), 50, wild=False)
    for kind in (danlu.EMA, danlu.Lookahead):
        model, whole = sharded_net(), net()
        opt, expected = kind(plain(model.parameters())), kind(plain(whole.parameters()))
        go(model, opt, range(3))
        go(whole, expected, range(3))
        shards = [(p, p.to_local().data_ptr(), full(p).detach().clone()) for p in model.parameters()]
        with in_place(expected), torch.no_grad():
            want = [p.detach().clone() for p in whole.parameters()]
            answer = whole(batch)
        with torch.no_grad():
            model(batch)  # the root module keeps what it has gathered
        model.reshard()
        with in_place(opt), torch.no_grad():
            assert same([full(p).detach() for p in model.parameters()], want)
            torch.testing.assert_close(model(batch), answer)
        model.reshard()
        for p, (q, address, fast) in zip(model.parameters(), shards, strict=True):
            assert p is q
            assert p.to_local().data_ptr() == address
            assert same_bits(full(p).detach(), fast)
        assert not same([fast for *_, fast in shards], want)
        go(model, opt, range(3, 9))
        go(whole, expected, range(3, 9))
        assert same(saved(opt), saved(expected))


@contextmanager
def in_place(opt: Any) -> Iterator[None]:
    if isinstance(opt, danlu.EMA):
        with opt.swap():
            yield
    else:
        opt.eval()
        yield
        opt.train()


CHECKS = [
    shards_step_as_the_whole,
    the_norm_is_that_of_all_shards,
    saved_shards_go_on,
    asked_for_their_state_shards_count_nothing,
    gradients_of_shards_may_lie_otherwise,
    a_part_is_refused_where_a_state_is_needed,
    nothing_piles_up,
    what_is_placed_otherwise_is_named,
    wrappers_go_on,
    weights_change_places,
    *plain_shards.CHECKS,
]


def load(model: nn.Module, opt: torch.optim.Optimizer, checkpoint: Path) -> None:
    states = dict(zip(("model", "optimizer"), get_state_dict(model, opt), strict=True))
    dcp.load(states, checkpoint_id=checkpoint)
    set_state_dict(model, opt, model_state_dict=states["model"], optim_state_dict=states["optimizer"])


def load_wrapped(model: nn.Module, opt: torch.optim.Optimizer, checkpoint: Path) -> None:
    states = {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, opt)}
    dcp.load(states, checkpoint_id=checkpoint)
    model.load_state_dict(states["model"])
    set_optimizer_state_dict(model, opt, states["optimizer"])


def work(rank: int, folder: Path, every: bool) -> None:
    """What one of the processes does."""
    global chosen
    chosen = CASES if every else plain_shards.SOME
    torch.set_num_threads(1)
    store = f"file://{folder / 'rendezvous'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=RANKS, timeout=PATIENCE)
    try:
        for check in CHECKS:
            try:
                check(rank, folder)
                outcome = ""
            except Exception as error:
                outcome = f"{type(error).__name__}: {error}"
            (folder / f"{check.__name__}.{rank}").write_text(outcome)
            dist.barrier()
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def every(pytestconfig: pytest.Config) -> bool:
    """Whether processes run what is left to --all."""
    return pytestconfig.getoption("--all") or any("::" in name for name in pytestconfig.args)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, every: bool) -> Path:
    """Where two processes have left what became of each check, and checkpoints."""
    path: Path = tmp_path_factory.mktemp("distributed")
    torch.multiprocessing.spawn(work, (path, every), nprocs=RANKS)
    return path


@pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.__name__)
def test_on_two_processes(check: Callable[..., Any], folder: Path) -> None:
    for rank in range(RANKS):
        assert (folder / f"{check.__name__}.{rank}").read_text() == ""


@pytest.mark.parametrize(
    "case",
    [case if case in plain_shards.SOME else pytest.param(case, marks=pytest.mark.full) for case in CASES],
    ids=lambda c: c.id,
)
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_a_sharded_checkpoint_goes_on_in_one_process(case: Case, folder: Path) -> None:
    model = net(seed=1)
    opt = case.make(model.parameters())
    load(model, opt, folder / case.id)
    go(model, opt, range(4, 9))
    assert same(everything(opt), torch.load(folder / f"{case.id}.pt"))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_a_sharded_wrapper_goes_on_in_one_process(folder: Path, every: bool) -> None:
    for name, make, wrapping, steps in SAVED if every else SOMEWHERE:
        model = net(seed=1)
        opt = wrapping.make(make(model.parameters()))
        load_wrapped(model, opt, folder / name)
        go(model, opt, range(steps, steps + wrapping.period + 1))
        assert same(saved(opt), torch.load(folder / f"{name}.pt")), name
