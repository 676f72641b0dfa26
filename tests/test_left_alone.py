"""Parameters that need no gradient and could not be stepped, as quantized weights, beside others."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

import danlu
from cases import values
from danlu import checks
from danlu.testing import same_bits

KINDS: dict[str, tuple[Callable[[], torch.Tensor], str]] = {
    "uint8": (lambda: torch.ones(4, 3, dtype=torch.uint8), "has dtype torch.uint8"),
    "int8": (lambda: torch.ones(4, 3, dtype=torch.int8), "has dtype torch.int8"),
    "bool": (lambda: torch.ones(4, 3, dtype=torch.bool), "has dtype torch.bool"),
    "complex": (lambda: torch.ones(4, 3, dtype=torch.complex64), "has dtype torch.complex64"),
    "expanded": (lambda: torch.ones(1, 3).expand(4, 3), "share memory"),
    "meta": (lambda: torch.ones(4, 3, device="meta"), "meta device"),
    "quantized": (lambda: torch.quantize_per_tensor(torch.ones(4, 3), 0.1, 0, torch.qint8), "is quantized"),
    "sparse": (lambda: torch.eye(3).to_sparse(), "has layout torch.sparse_coo"),
}
own = danlu.custom(
    "Own",
    states=["exp_avg"],
    defaults=dict(lr=0.1),
    reference=lambda p, g, m, *, step, lr: m.add_(g) * lr,
    coefficients=lambda math, *, step, lr: dict(lr=lr),
)
MAKES: dict[str, Callable[..., Any]] = {
    "adamw": danlu.AdamW,
    "lamb": danlu.LAMB,
    "custom": own,
    "layer": lambda params, **engine: danlu.LayerAdaptation(danlu.Lion(params, **engine)),
    "lazy": lambda params, **engine: danlu.Lazy(danlu.Lion(params, **engine)),
    "lazy-params": lambda params, **engine: danlu.Lazy(danlu.Lion(params, **engine), "params"),
    "ema": lambda params, **engine: danlu.EMA(danlu.AdamW(params, **engine), decay=0.5),
}
pytestmark = pytest.mark.filterwarnings(
    "ignore:torch.quantize_per_tensor", "ignore:torch.distributed is disabled"
)


# every kind in a step and in a pass over all parameters, every optimizer beside two kinds
PAIRS = [
    (kind, name)
    for kind in KINDS
    for name in MAKES
    if name in ("adamw", "ema") or kind in ("uint8", "expanded")
]


def odd(kind: str) -> torch.nn.Parameter:
    return torch.nn.Parameter(KINDS[kind][0](), requires_grad=False)


def good() -> torch.nn.Parameter:
    return torch.nn.Parameter(values((4, 3), 0, wild=False))


def step(opt: Any, p: torch.Tensor, times: int = 2) -> torch.Tensor:
    for t in range(times):
        p.grad = values((4, 3), t + 1, wild=False)
        opt.step()
    p.grad = None
    return p.detach()


@pytest.mark.parametrize(("kind", "name"), PAIRS)
def test_a_report_lists_it_and_steps_go_on(kind: str, name: str, backend: str) -> None:
    frozen, p, alone = odd(kind), good(), good()
    before = repr(frozen)
    opt, expected = MAKES[name]([frozen, p], backend=backend), MAKES[name]([alone], backend=backend)
    for _ in range(2):
        rows = opt.backend_report()
        assert [row.backend == "none" for row in rows] == [True, False]
        assert re.search(f"left alone: .*parameter.*{KINDS[kind][1]}", rows[0].reason)
        assert "left alone" in str(rows)
        assert same_bits(step(opt, p), step(expected, alone))
    assert repr(frozen) == before
    assert frozen not in opt.state
    assert list(opt.state_dict()["state"]) == [1]


@pytest.mark.parametrize(("kind", "name"), PAIRS)
def test_checkpoints_and_copies(kind: str, name: str) -> None:
    frozen, p, other = odd(kind), good(), good()
    opt = MAKES[name]([frozen, p])
    step(opt, p)
    loaded = MAKES[name]([odd(kind), other])
    loaded.load_state_dict(copy.deepcopy(opt.state_dict()))
    other.data.copy_(p.detach())
    runs = [(loaded, other)]
    if kind != "sparse":  # which torch does not copy
        copied = copy.deepcopy(opt)
        runs.append((copied, copied.param_groups[0]["params"][1]))
    expected = step(opt, p)
    assert all(same_bits(step(*run), expected) for run in runs)


@pytest.mark.parametrize("kind", ["uint8", "complex", "expanded"])
def test_distributed_checkpoints_make_no_state_of_it(kind: str) -> None:
    model = torch.nn.Module()
    model.frozen, model.p = odd(kind), good()
    opt = danlu.AdamW(model.parameters())
    saved = get_optimizer_state_dict(model, opt)
    assert list(saved["state"]) == ["p"]
    set_optimizer_state_dict(model, opt, saved)
    assert model.frozen not in opt.state
    step(opt, model.p)


@pytest.mark.parametrize("kind", KINDS)
def test_state_from_before_it_was_quantized_is_kept(kind: str, backend: str) -> None:
    frozen, p = odd(kind), good()
    opt = danlu.Lion([frozen, p], backend=backend)
    moment = torch.ones(4, 3)
    opt.state[frozen] = {"step": torch.tensor(3.0), "exp_avg": moment}
    step(opt, p)
    assert opt.state[frozen]["exp_avg"] is moment
    assert opt.state[frozen]["step"] == 3
    assert opt.state[p]["step"] == 2
    assert opt.backend_report()[0].backend == "none"


def test_one_that_gets_a_gradient_is_stepped_or_named(backend: str) -> None:
    frozen, p = odd("expanded"), good()
    opt = danlu.Lion([frozen, p], backend=backend)
    opt.state[frozen] = {"step": torch.tensor(3.0), "exp_avg": torch.zeros(4, 3)}
    step(opt, p)
    before = p.detach().clone()
    frozen.grad, p.grad = torch.ones(4, 3), torch.ones(4, 3)
    for ask in (opt.step, opt.backend_report):
        with pytest.raises(ValueError, match=r"params'\]\[0\]: .* share memory"):
            ask()
    assert same_bits(p.detach(), before)
    frozen.data = torch.ones(4, 3)
    opt.step()
    assert opt.state[frozen]["step"] == 4


def test_one_that_wants_a_gradient_and_cannot_be_stepped_is_named() -> None:
    for kind in ("complex", "expanded"):
        p = odd(kind).requires_grad_()
        with pytest.raises((TypeError, ValueError), match=r"params'\]\[0\]: .*parameter"):
            danlu.AdamW([p]).backend_report()
        with pytest.raises((TypeError, ValueError), match=r"params'\]\[0\]: .*parameter"):
            danlu.EMA(danlu.AdamW([p])).step()


def test_an_average_begins_when_it_can(backend: str) -> None:
    """A pass over all parameters notices what has become of one that it left alone."""
    frozen, p = odd("expanded"), good()
    opt = danlu.EMA(danlu.AdamW([frozen, p], backend=backend), decay=0.5)
    step(opt, p)
    assert [row.backend == "none" for row in opt.backend_report()] == [True, False]
    frozen.data = torch.ones(4, 3)
    step(opt, p)
    with opt.swap():
        assert torch.equal(frozen, torch.ones(4, 3))
    assert {index: held["ema_step"].item() for index, held in opt.state_dict()["state"].items()} == {
        0: 2,
        1: 4,
    }


def test_a_scalar_that_is_frozen_has_no_rows() -> None:
    frozen, p = torch.nn.Parameter(torch.ones(()), requires_grad=False), good()
    opt = danlu.Lazy(danlu.Lion([frozen, p]))
    step(opt, p)
    assert [row.backend == "none" for row in opt.backend_report()] == [True, False]


def test_parameters_that_get_their_shape_later(backend: str) -> None:
    model = torch.nn.LazyLinear(3)
    opt = danlu.AdamW(model.parameters(), backend=backend)
    opt.step()
    report = opt.backend_report()
    assert {row.backend for row in report} == {"none"}
    assert "first forward pass" in report[0].reason
    with pytest.raises(ValueError, match=r"params'\]\[0\]: .* first forward pass"):
        danlu.EMA(danlu.AdamW(model.parameters())).step()
    model(torch.ones(2, 4)).sum().backward()
    opt.step()
    assert {row.backend for row in opt.backend_report()} == {backend}
    assert opt.state[model.weight]["exp_avg"].shape == (3, 4)


def test_what_can_be_stepped() -> None:
    assert not any(checks.can_be_stepped(odd(kind)) for kind in KINDS)
    assert not checks.can_be_stepped(torch.nn.LazyLinear(3).weight)
    fine = (good(), torch.ones(()), torch.ones(0, 3), torch.ones(3, 4, dtype=torch.float64).t())
    assert all(map(checks.can_be_stepped, fine))
