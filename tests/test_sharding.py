"""Pieces of parameters that look like plain tensors; test_distributed.py has those of torch itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import danlu
from cases import ALL, CASES, Case, values
from danlu.testing import same_bits

MARKS = {"_fsdp_flattened": True, "ds_id": "0_3"}
WAY_OUT = {
    "_fsdp_flattened": r"FSDP1.*FullyShardedDataParallel\.clip_grad_norm_.*fully_shard",
    "ds_id": "ZeRO stage 3.*DeepSpeed's gradient_clipping",
}
SUMS: dict[str, Callable[..., Any]] = {case.id: case.make for case in ALL if case.reduces}
ROWS: dict[str, Callable[..., Any]] = {
    "rows": lambda params, **engine: danlu.Lazy(danlu.Lion(params, **engine)),
    "params": lambda params, **engine: danlu.Lazy(danlu.AdamW(params, **engine), "params"),
}
WHOLE: dict[str, Callable[..., Any]] = SUMS | ROWS


def piece(mark: str, *, with_gradient: bool = True) -> torch.nn.Parameter:
    p = torch.nn.Parameter(values((7,), 0, wild=False))
    if with_gradient:
        p.grad = values((7,), 1, wild=False)
    setattr(p, mark, MARKS[mark])
    return p


@pytest.mark.parametrize("mark", MARKS)
@pytest.mark.parametrize("name", WHOLE)
def test_what_needs_whole_parameters_refuses_pieces(name: str, mark: str) -> None:
    with pytest.raises(ValueError, match=r"^flat: .*(sums over whole tensors|steps whole rows).*Distributed"):
        WHOLE[name]([("flat", piece(mark))])


@pytest.mark.parametrize("mark", MARKS)
def test_a_norm_over_pieces_is_refused(mark: str) -> None:
    with pytest.raises(ValueError, match=f"^flat: max_grad_norm .*{WAY_OUT[mark]}"):
        danlu.AdamW([("flat", piece(mark))], max_grad_norm=1.0)


@pytest.mark.parametrize("mark", MARKS)
@pytest.mark.parametrize("name", [*WHOLE, "norm"])
def test_pieces_that_take_a_place_later_are_refused_before_anything_moves(
    name: str, mark: str, backend: str
) -> None:
    """As DeepSpeed puts them into the groups of an optimizer that was given whole parameters."""
    make: Callable[..., Any] = WHOLE.get(
        name, lambda params, **e: danlu.AdamW(params, max_grad_norm=1.0, **e)
    )
    first, second = (torch.nn.Parameter(values((7,), i, wild=False)) for i in range(2))
    opt = make([first, second], backend=backend)
    first.grad, second.grad = values((7,), 2, wild=False), values((7,), 3, wild=False)
    opt.step()
    before, count = first.detach().clone(), opt.state[first]["step"].clone()
    opt.param_groups[0]["params"][1] = piece(mark)
    with pytest.raises(ValueError, match=r"^param_groups\[0\]\['params'\]\[1\]: "):
        opt.step()
    assert same_bits(first.detach(), before)
    assert opt.state[first]["step"] == count


@pytest.mark.parametrize("mark", MARKS)
def test_a_group_of_pieces_is_refused_and_not_added(mark: str) -> None:
    opt = danlu.LAMB([torch.nn.Parameter(torch.ones(3))])
    with pytest.raises(ValueError, match="sums over whole tensors"):
        opt.add_param_group({"params": [piece(mark)]})
    assert len(opt.param_groups) == 1
    opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})


def test_groups_that_are_not_lazy_take_pieces() -> None:
    groups = [{"params": [torch.nn.Parameter(torch.ones(3, 2))], "lazy": True}]
    opt = danlu.Lazy(danlu.Lion([*groups, {"params": [piece("ds_id")], "lazy": False}]))
    opt.step()


def test_frozen_pieces_are_left_alone() -> None:
    frozen = piece("_fsdp_flattened", with_gradient=False).requires_grad_(False)
    opt = danlu.LAMB([frozen])
    opt.step()
    (row,) = opt.backend_report()
    assert row.backend == "none"


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_pieces_step_as_the_whole(case: Case, backend: str) -> None:
    """Flattened parameters cut anywhere, as by every engine there is; marked or not."""
    whole = [
        torch.nn.Parameter(values(shape, i, wild=False)) for i, shape in enumerate([(5, 3), (4,), (2, 3)])
    ]
    flat = torch.cat([p.detach().flatten() for p in whole])
    pieces = [torch.nn.Parameter(part.clone()) for part in flat.split([9, 16])]
    pieces[0]._fsdp_flattened = True  # type: ignore[attr-defined]
    expected, opt = case.make(whole, backend=backend), case.make(pieces, backend=backend)
    for t in range(3):
        for i, p in enumerate(whole):
            p.grad = values(p.shape, 10 * t + i, wild=False)
        gradients = torch.cat([p.grad.flatten() for p in whole if p.grad is not None]).split([9, 16])
        for p, g in zip(pieces, gradients, strict=True):
            p.grad = g.clone()
        expected.step()
        opt.step()
    assert same_bits(torch.cat(pieces).detach(), torch.cat([p.detach().flatten() for p in whole]))


@pytest.mark.parametrize("mark", MARKS)
def test_groups_by_shape_need_shapes(mark: str) -> None:
    model = torch.nn.Linear(3, 2)
    setattr(model.weight, mark, MARKS[mark])
    for make in (danlu.amos_groups, lambda model: danlu.amos_strategy(model, 1e-3, half_life=100)):
        with pytest.raises(ValueError, match=r"^weight: .* has flattened the parameter"):
            make(model)
    danlu.amos_strategy(model, 1e-3, half_life=100, sigma={"weight": 0.5})  # which needs none
    danlu.param_groups(model, 0.1)  # nor does this one, of views that have names
