"""What a lazy step refuses: gradients and optimizers, by name, with nothing changed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

import danlu
from cases import REDUCING
from danlu import checks
from danlu.testing import same_bits
from lazy_runs import LAZY, MODES, coo

every_case = pytest.mark.parametrize("case", LAZY, ids=lambda c: c.id)
every_mode = pytest.mark.parametrize("mode", MODES)


# what a gradient may not be, for a parameter of shape (4, 3): (how it is made, error, words)
BAD = {
    "row too large": (
        lambda: coo([4], torch.ones(1, 3), (4, 3)),
        ValueError,
        "lists row 4, the parameter has 4 rows",
    ),
    "row below 0": (
        lambda: coo([2, -1], torch.ones(2, 3), (4, 3)),
        ValueError,
        "lists row -1, the parameter has 4 rows",
    ),
    "row far away": (lambda: coo([2**40], torch.ones(1, 3), (4, 3)), ValueError, "lists row 1099511627776"),
    "shape": (
        lambda: coo([1], torch.ones(1, 3), (5, 3)),
        ValueError,
        r"shape \(5, 3\), the parameter has \(4, 3\)",
    ),
    "elements": (lambda: torch.eye(4, 3).to_sparse(), TypeError, "sparse in 2 dimensions.*rows"),
}


@every_mode
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("planned", [False, True])
def test_a_bad_gradient_is_named_and_changes_nothing(
    bad: str, mode: str, backend: str, planned: bool
) -> None:
    make, error, words = BAD[bad]
    params = [torch.nn.Parameter(torch.ones(4, 3)) for _ in range(3)]
    opt = danlu.Lazy(
        danlu.AdamW([("a", params[0]), ("b", params[1]), ("c", params[2])], backend=backend), mode
    )
    for p in params:
        p.grad = coo([1], torch.ones(1, 3), (4, 3))
    if planned:
        opt.step()
    before = [copy.deepcopy((p.detach(), dict(opt.state.get(p, {})))) for p in params]
    if bad == "shape":
        params[1].data = torch.ones(5, 3)  # torch compares shapes when a gradient is assigned
    params[1].grad = None
    params[1].grad = make()
    if bad == "shape":
        params[1].data = torch.ones(4, 3)
        params[1].data.copy_(before[1][0])
    with pytest.raises(error, match=f"^b: .*{words}"):
        opt.step()
    for p, (old, state) in zip(params, before, strict=True):
        assert same_bits(p, old)
        assert opt.state.get(p, {}).keys() == state.keys()
        assert all(same_bits(opt.state[p][key], value) for key, value in state.items())
    params[1].grad = None
    opt.step()
    assert opt.state[params[0]]["step"] == 1 + planned


@pytest.mark.filterwarnings("ignore:Sparse CS. tensor support:UserWarning")
def test_other_sparse_layouts_are_named() -> None:
    """torch lets no such gradient be assigned so far."""
    p = torch.ones(4, 3)
    for g in (torch.eye(4, 3).to_sparse_csr(), torch.eye(4, 3).to_sparse_csc()):
        with pytest.raises(TypeError, match=f"^weight: the gradient has layout {g.layout}; danlu.Lazy takes"):
            checks.listed_rows("weight", p, g)


@every_mode
def test_other_errors_name_the_parameter(mode: str, backend: str) -> None:
    scalar = torch.nn.Parameter(torch.tensor(1.0))
    opt = danlu.Lazy(danlu.Lion([("scale", scalar)], backend=backend), mode)
    scalar.grad = torch.tensor(1.0)
    with pytest.raises(ValueError, match=r"^scale: .*0 dimensions"):
        opt.step()
    table = torch.nn.Parameter(torch.ones(4, 3))
    groups = [{"params": [("table", table)], "lazy": False}, {"params": [("scale", scalar)], "lazy": False}]
    opt = danlu.Lazy(danlu.Lion(groups, backend=backend), mode)
    table.grad = coo([1], torch.ones(1, 3), (4, 3))
    with pytest.raises(TypeError, match=r"^table: the gradient is sparse.*danlu\.Lazy"):
        opt.step()
    table.grad = None
    opt.step()  # an ordinary parameter may have no dimension
    assert scalar != 1


class NotDanlu(torch.optim.SGD):
    pass


def tensors() -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.ones(4, 3))]


REFUSED: dict[str, tuple[Callable[[], Any], str, str]] = {
    "torch": (lambda: torch.optim.SGD(tensors()), "rows", "optimizer must be a danlu optimizer, got torch"),
    "adapted rows": (
        lambda: danlu.LayerAdaptation(danlu.Lion(tensors())),
        "rows",
        r"LayerAdaptation sums.*rows; Lazy\(LayerAdaptation\(optimizer\), mode='params'\)",
    ),
    "tiger": (lambda: danlu.Tiger(tensors(), accumulation_steps=2), "rows", "accumulation_steps must be 1"),
    **{
        f"{case.id} {mode}": (
            lambda case=case: case.make(tensors()),
            mode,
            f"optimizer must have.*{case.optimizer.__name__} sums",
        )
        for case in REDUCING
        if not case.adapted
        for mode in MODES
    },
}


@pytest.mark.parametrize("name", REFUSED)
def test_optimizers_that_cannot_be_lazy(name: str) -> None:
    make, mode, words = REFUSED[name]
    with pytest.raises(TypeError, match=words):
        danlu.Lazy(make(), mode)


def test_groups_that_cannot_be_lazy_raise_at_the_next_step() -> None:
    (p,) = tensors()
    opt = danlu.Lazy(danlu.Tiger([p]))
    p.grad = torch.ones(4, 3)
    opt.step()
    opt.param_groups[0]["accumulation_steps"] = 2
    before = p.detach().clone()
    with pytest.raises(TypeError, match="accumulation_steps must be 1"):
        opt.step()
    assert same_bits(p, before)
    with pytest.raises(ValueError, match="mode must be one of 'rows', 'params', got 'row'"):
        danlu.Lazy(danlu.Lion(tensors()), "row")
