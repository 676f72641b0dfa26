"""Tiger with steps relative to the parameter, against its author's code."""

from __future__ import annotations

import itertools
import math
import re
from functools import partial
from typing import Any

import pytest
import torch

import danlu
from cases import F64, values
from danlu.testing import same_bits
from oracles.itself import assert_as_in_float64, assert_resumes
from oracles.su_tiger import tiger
from training import all_same, copies, give_gradients, some_params, train

BACKENDS = ["reference", "cpu"]
each_backend = pytest.mark.parametrize("backend", BACKENDS)

KINDS = ["matrix", "embedding", "vector"]
each_kind = pytest.mark.parametrize("kind", KINDS)
SHAPES = [(), (1,), (7,), (6, 5), (3, 4, 5), (2, 1, 4)]

# Largest difference over largest value, in float64: ulps of a root and of 12 parameters.
TOLERANCE = 2e-15
STEPS = 12


@pytest.mark.parametrize("k", [1, 3])
@each_kind
def test_equals_the_authors_code(kind: str, k: int) -> None:
    hyper = dict(lr=0.1, beta=0.9, weight_decay=0.3, accumulation_steps=k)
    starts = [values(shape, i, wild=False).double() for i, shape in enumerate(SHAPES)]
    params = [torch.nn.Parameter(p.clone()) for p in starts]
    opt = danlu.Tiger(params, scale_parameter=True, kind=kind, **hyper)  # type: ignore[arg-type]
    gradients: list[list[torch.Tensor]] = [[] for _ in params]
    for t in range(STEPS):
        for i, p in enumerate(params):
            p.grad = values(p.shape, 100 * (t + 1) + i, wild=False).double()
            gradients[i].append(p.grad)
        opt.step()
    for p, start, given in zip(params, starts, gradients, strict=True):
        theirs = tiger(start.numpy(), [g.numpy() for g in given], kind, **hyper)  # type: ignore[arg-type]
        for ours, wanted in zip(
            (p.detach(), opt.state[p]["exp_avg"]), map(torch.tensor, theirs), strict=True
        ):
            assert (ours - wanted).abs().max() <= TOLERANCE * wanted.abs().max()


@each_backend
@pytest.mark.parametrize("k", [1, 2])
@each_kind
def test_fp32_as_float64(kind: str, k: int, backend: str) -> None:
    make = partial(danlu.Tiger, lr=0.01, accumulation_steps=k, scale_parameter=True, kind=kind)
    shapes = [(), (1,), (33,), (0,), (3, 0), (0, 3), (70, 257), (5, 3, 2), (3, 100_001), (50_001, 3)]
    assert_as_in_float64(make, shapes, backend)


# kind and shape to (batch, rows, columns)
MATRICES: list[tuple[str, tuple[int, ...], tuple[int, int, int]]] = [
    ("embedding", (6, 5), (1, 6, 5)),
    ("embedding", (2, 3, 5), (1, 6, 5)),
    ("embedding", (5,), (1, 1, 5)),
    ("embedding", (), (1, 1, 1)),
    ("embedding", (0, 5), (1, 0, 5)),
    ("matrix", (6, 5), (1, 1, 30)),
    ("vector", (6, 5), (1, 1, 30)),
    ("matrix", (), (1, 1, 1)),
]


@pytest.mark.parametrize(("kind", "shape", "matrix"), MATRICES)
def test_how_kernels_see_it(kind: str, shape: tuple[int, ...], matrix: tuple[int, int, int]) -> None:
    opt = danlu.Tiger([torch.zeros(shape)], scale_parameter=True, kind=kind)
    (group,) = opt.param_groups
    rule = dict(matrix="tiger_matrix", embedding="tiger_rows", vector="tiger")[kind]
    assert (opt.rule(group, shape), opt.matrix(group, shape)) == (rule, matrix)
    keys = (
        ["keep", "weight", "eta", "decay"] if kind == "vector" else ["keep", "weight", "lr", "weight_decay"]
    )
    assert list(opt.fold(group, 1.0, 0.0)) == keys
    assert opt.reduces == (kind != "vector")


@each_backend
def test_groups_of_every_kind(backend: str) -> None:
    """As optimizers of their own; without scale_parameter a kind has no effect."""
    settings: list[dict[str, Any]] = [
        *(dict(kind=kind, scale_parameter=True, lr=0.1 * (i + 1)) for i, kind in enumerate(KINDS)),
        dict(kind="matrix"),
        dict(),
    ]
    together, apart = some_params(len(settings)), some_params(len(settings))
    one = danlu.Tiger(
        [dict(params=[p], **setting) for p, setting in zip(together, settings, strict=True)], backend=backend
    )
    several = [
        danlu.Tiger(
            [p], **{**setting, "kind": setting.get("kind") if "lr" in setting else None}, backend=backend
        )
        for p, setting in zip(apart, settings, strict=True)
    ]
    for t in range(4):
        give_gradients(together, t)
        give_gradients(apart, t)
        one.step()
        for opt in several:
            opt.step()
    for p, q in zip(together, apart, strict=True):
        assert same_bits(p, q)


@each_backend
def test_a_zero_tensor_never_moves(backend: str) -> None:
    zero, row = torch.nn.Parameter(torch.zeros(4, 3)), torch.nn.Parameter(torch.ones(4, 3))
    with torch.no_grad():
        row[1] = 0.0
    groups = [dict(params=[zero], kind="matrix"), dict(params=[row], kind="embedding")]
    train(danlu.Tiger(groups, lr=0.1, scale_parameter=True, backend=backend), range(3))
    assert not zero.any()
    assert [bool(r.eq(0).all()) for r in row] == [False, True, False, False]
    assert row[0].ne(1).all()


@each_backend
@pytest.mark.parametrize(("kind", "spoiled"), [("matrix", 12), ("embedding", 3), ("vector", 1)])
def test_nan_shows(kind: str, spoiled: int, backend: str) -> None:
    """In a parameter it spoils what is scaled by it, in a gradient its own element."""
    for where in ("parameter", "gradient"):
        p = torch.nn.Parameter(torch.ones(4, 3))
        p.grad = torch.ones(4, 3)
        (p.data if where == "parameter" else p.grad)[2, 1] = math.nan
        danlu.Tiger([p], scale_parameter=True, kind=kind, backend=backend).step()
        assert p.isnan().sum() == (spoiled if where == "parameter" else 1)


@each_backend
@pytest.mark.parametrize(("before", "after"), list(itertools.permutations([None, *KINDS], 2)))
def test_a_group_may_change_its_kind(before: str | None, after: str | None, backend: str) -> None:
    """The plan in use must see it: loading is what makes a new one."""

    def changed(load: bool) -> list[torch.Tensor]:
        params = some_params()
        opt = danlu.Tiger(params, lr=0.1, scale_parameter=before is not None, kind=before, backend=backend)
        train(opt, range(2))
        opt.param_groups[0].update(scale_parameter=after is not None, kind=after)
        if load:
            opt.load_state_dict(opt.state_dict())
        train(opt, range(2, 4))
        return copies(opt)

    assert all_same(changed(load=False), changed(load=True))


@each_backend
@each_kind
def test_resumes_exactly(kind: str, backend: str) -> None:
    make = partial(danlu.Tiger, lr=0.1, accumulation_steps=2, scale_parameter=True, kind=kind)
    assert_resumes(make, [(), (7,), (30, 50), (2, 0)], backend)


@each_backend
def test_row_by_row_needs_the_order_of_rows(backend: str) -> None:
    """Another order of strides is no hindrance where the sum is over all."""
    found = {}
    for kind in KINDS:
        p = torch.nn.Parameter(values((5, 6), 0, wild=False).t())
        p.grad = values((5, 6), 1, wild=False).t()
        opt = danlu.Tiger([p], lr=0.1, scale_parameter=True, kind=kind, backend=backend)
        opt.step()
        (row,) = opt.backend_report()
        found[kind] = row.backend
        exact = torch.nn.Parameter(values((5, 6), 0, wild=False).t().to(F64))
        exact.grad = p.grad.double()
        danlu.Tiger([exact], lr=0.1, scale_parameter=True, kind=kind).step()
        torch.testing.assert_close(p.double(), exact, rtol=1e-6, atol=1e-7)
    assert found == dict(matrix=backend, embedding="reference", vector=backend)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(scale_parameter=True), "kind must be one of 'matrix', 'embedding', 'vector', got None"),
        (dict(scale_parameter=True, kind="bias"), "kind must be one of .*, got 'bias'"),
        (dict(kind="bias"), "kind must be one of .*, got 'bias'"),
        (dict(scale_parameter="yes", kind="matrix"), "scale_parameter must be one of False, True, got 'yes'"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    p, q = some_params(2)
    with pytest.raises(ValueError, match=message):
        danlu.Tiger([p], **settings)
    with pytest.raises(ValueError, match=message):
        danlu.Tiger([dict(params=[p], **settings)])
    opt = danlu.Tiger([p])
    with pytest.raises(ValueError, match=message):
        opt.add_param_group(dict(params=[q], **settings))
    assert len(opt.param_groups) == 1


@each_backend
def test_a_group_that_loses_its_kind(backend: str) -> None:
    (p,) = some_params(1)
    opt = danlu.Tiger([p], scale_parameter=True, kind="matrix", backend=backend)
    train(opt, range(1))
    opt.param_groups[0]["kind"] = None
    before = copies(opt)
    with pytest.raises(ValueError, match=re.escape("kind must be one of 'matrix'")):
        train(opt, range(1))
    assert all_same(copies(opt), before)
