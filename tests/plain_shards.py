"""DDP, ZeroRedundancyOptimizer and FSDP1 on two processes: what the table of docs/sharding.md says.

Both have the same batch, so that the mean of their gradients is the gradient of one process to the last bit.
"""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

import danlu
from cases import CASES, values
from danlu.testing import same_bits
from wrapped import BY_ID, MAKERS, WRAPPERS

Make = Callable[[Any], Any]
# with each list of states one: a shard knows nothing of formulas; every case with --all
SOME = [case for case in CASES if case.id in ("lion", "tiger-accumulate", "adamw", "adaxw")]
STEPS = 4  # the longest period of a wrapper


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4, bias=False), nn.Tanh(), nn.Linear(4, 1))


def go(model: nn.Module, opt: Any) -> None:
    for t in range(STEPS):
        opt.zero_grad()
        model(values((6, 3), t, wild=False)).square().sum().backward()
        opt.step()


@functools.cache
def stepped(make: Make) -> list[torch.Tensor]:
    """By one process; of an EMA the averages behind the parameters."""
    model = net()
    opt = make(model.parameters())
    go(model, opt)
    found = [p.detach().clone() for p in model.parameters()]
    with averages(opt):
        return found + [p.detach().clone() for p in model.parameters()]


def averages(opt: Any) -> Any:
    return opt.swap() if isinstance(opt, danlu.EMA) else nullcontext()


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(map(same_bits, a, b))


def clipped(make: Callable[..., Any]) -> Make:
    return lambda params: make(params, max_grad_norm=0.1)


# one of each class, and of each kind of sum
EVERY_RULE: dict[str, Make] = {
    name: MAKERS[name]
    for name in (
        *("lion", "tiger", "adam", "adamw", "adax", "adaxw", "adafactor", "adafactor-torch", "lamb"),
        *("tiger-matrix", "amos-momentum", "layer-adamw", "lazy-adamw", "lazy-layer-lion"),
    )
}
AROUND_WHAT: Make = functools.partial(danlu.AdamW, lr=1e-2)
AROUND: dict[str, Make] = {
    wrapping.id: lambda params, wrapping=wrapping: wrapping.make(AROUND_WHAT(params)) for wrapping in WRAPPERS
}
CLIPPED = {f"clipped-{name}": clipped(MAKERS[name]) for name in ("adamw", "lamb", "lazy-adamw")}


def ddp_is_exact(rank: int, folder: Path) -> None:
    for name, make in {**EVERY_RULE, **AROUND, **CLIPPED}.items():
        model = DistributedDataParallel(net())
        opt = make(model.parameters())
        go(model, opt)
        found = [p.detach().clone() for p in model.parameters()]
        with averages(opt):
            found += [p.detach().clone() for p in model.parameters()]
        assert same(found, stepped(make)), name


def ddp_sums_listed_rows(rank: int, folder: Path) -> None:
    def embed(model: nn.Module, opt: Any) -> None:
        for t in range(STEPS):
            opt.zero_grad()
            model(torch.tensor([t, 1, 7])).square().sum().backward()
            opt.step()

    results = []
    for around in (DistributedDataParallel, lambda model: model):
        model = around(nn.Embedding(9, 4, sparse=True, _weight=values((9, 4), 0, wild=False)))
        embed(model, danlu.Lazy(danlu.AdamW(model.parameters(), lr=1e-2)))
        results.append([p.detach() for p in model.parameters()])
    assert same(*results)


def zero_redundancy_is_exact(rank: int, folder: Path) -> None:
    """Around it are the wrappers, inside it the rules; max_grad_norm there has the gradients of one rank."""
    for i, (name, make) in enumerate({**EVERY_RULE, **AROUND}.items()):
        model = DistributedDataParallel(net())
        opt = zero(model, AROUND_WHAT if name in AROUND else make, views=i % 2 == 0)
        for wrapping in WRAPPERS:
            if wrapping.id == name:
                opt = wrapping.make(opt)
        go(model, opt)
        found = [p.detach().clone() for p in model.parameters()]
        with averages(opt):
            found += [p.detach().clone() for p in model.parameters()]
        assert same(found, stepped(make)), name


def zero(model: nn.Module, make: Make, views: bool) -> torch.optim.Optimizer:
    from torch.distributed.optim import ZeroRedundancyOptimizer  # whose import warns

    return ZeroRedundancyOptimizer(
        model.parameters(),
        optimizer_class=lambda params, **_: make(params),  # type: ignore[arg-type]
        parameters_as_bucket_view=views,
    )


def fsdp(use_orig_params: bool) -> FullyShardedDataParallel:
    model = net()
    options: Any = dict(use_orig_params=use_orig_params, device_id=torch.device("cpu"))
    model[0] = FullyShardedDataParallel(model[0], **options)
    return FullyShardedDataParallel(model, **options)


@contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def whole(model: FullyShardedDataParallel) -> list[torch.Tensor]:
    with FullyShardedDataParallel.summon_full_params(model, writeback=False):
        return [p.detach().clone() for p in model.parameters()]


def flat_pieces_step_as_the_whole(rank: int, folder: Path) -> None:
    """Element-wise rules, and their wrappers."""
    makes = {name: make for name, make in EVERY_RULE.items() if BY_ID.get(name) in CASES} | AROUND
    with quiet():
        for name, make in makes.items():
            for use_orig_params in (False, True):
                model = fsdp(use_orig_params)
                opt = make(model.parameters())
                go(model, opt)
                found = whole(model)
                with averages(opt):
                    found += whole(model)
                assert same(found, stepped(make)), (name, use_orig_params)


def flat_pieces_are_refused_by_name(rank: int, folder: Path) -> None:
    """Of what needs whole parameters or all gradients; before there is an optimizer."""
    sums, rows = "sums over whole tensors, FSDP1", "steps whole rows, FSDP1"
    makes: list[tuple[Callable[[Any], Any], str]] = [
        (danlu.Adafactor, sums),
        (danlu.LAMB, sums),
        (lambda params: danlu.Amos(params, lr=1e-2, eta=0.5), sums),
        (lambda params: danlu.Tiger(params, scale_parameter=True, kind="matrix"), sums),
        (lambda params: danlu.LayerAdaptation(danlu.Lion(params)), sums),
        (lambda params: danlu.Lazy(danlu.Lion(params)), rows),
        (lambda params: danlu.Lazy(danlu.Lion(params), "params"), rows),
        (
            lambda params: danlu.AdamW(params, max_grad_norm=1.0),
            "max_grad_norm .* FullyShardedDataParallel.clip",
        ),
    ]
    with quiet():
        for use_orig_params in (False, True):
            model = fsdp(use_orig_params)
            name = next(name for name, _ in model.named_parameters())
            for make, message in makes:
                expect(
                    lambda make=make, model=model: make(model.named_parameters()),
                    f"^{re.escape(name)}: .*{message}",
                )
            expect(
                lambda model=model: danlu.amos_strategy(model, 1e-3, half_life=100),
                "has flattened the parameter",
            )
            expect(lambda model=model: danlu.amos_groups(model), "has flattened the parameter")
            if not use_orig_params:
                expect(lambda model=model: danlu.param_groups(model, 0.1), "has flattened the parameter")


def no_norm_is_taken_in_the_backward_pass(rank: int, folder: Path) -> None:
    from torch.distributed.optim import _apply_optimizer_in_backward

    model = net()
    before = [p.detach().clone() for p in model.parameters()]
    _apply_optimizer_in_backward(danlu.AdamW, model.parameters(), {"max_grad_norm": 1.0})
    loss = model(values((6, 3), 0, wild=False)).square().sum()
    expect(loss.backward, "max_grad_norm needs all gradients")
    assert same([p.detach() for p in model.parameters()], before)


def expect(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


CHECKS = [
    ddp_is_exact,
    ddp_sums_listed_rows,
    zero_redundancy_is_exact,
    flat_pieces_step_as_the_whole,
    flat_pieces_are_refused_by_name,
    no_norm_is_taken_in_the_backward_pass,
]
