"""Amos against its authors' code, over every kind of shared statistics."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
import pytest
import pytorch_optimizer
import torch

import danlu
from cases import BF16, F32, F64, values
from danlu.sharding import reduced_shape
from danlu.testing import same_bits
from oracles.itself import assert_as_in_float64, assert_resumes
from oracles.jax_optimizers import Run, trajectories
from training import all_same, copies, everything, some_params, train

BACKENDS = ["reference", "cpu"]
each_backend = pytest.mark.parametrize("backend", BACKENDS)

Dims = tuple[int, ...] | None
Matrix = tuple[int, int, int] | None

# shape, reduce_dims, and which native rule sees what
ELEMENTWISE, ROWS, COLUMNS = "amos_elementwise", "amos_rows", "amos_columns"
SHAPES: list[tuple[tuple[int, ...], Dims, str, Matrix]] = [
    ((), None, ROWS, (1, 1, 1)),
    ((7,), None, ROWS, (1, 1, 7)),
    ((7,), (), ELEMENTWISE, (1, 1, 7)),
    ((6, 5), None, ROWS, (1, 1, 30)),
    ((6, 5), (), ELEMENTWISE, (1, 1, 30)),
    ((6, 5), (1,), ROWS, (1, 6, 5)),
    ((6, 5), (-1,), ROWS, (1, 6, 5)),
    ((6, 5), (0,), COLUMNS, (1, 6, 5)),
    ((6, 5), (1, 0), ROWS, (1, 1, 30)),
    ((3, 4, 5), (1,), COLUMNS, (3, 4, 5)),
    ((3, 4, 5), (0, 1), COLUMNS, (1, 12, 5)),
    ((3, 4, 5), (2,), ROWS, (1, 12, 5)),
    ((3, 4, 5), (0, 2), ROWS, None),
    ((4, 3, 2, 2), (1, 2, 3), ROWS, (1, 4, 12)),
    ((2, 3, 4, 5), (1, 2), COLUMNS, (2, 12, 5)),
    ((2, 3, 4, 5), (1, 3), ROWS, None),
    ((2, 3, 4, 5), (0, 2), COLUMNS, None),
    ((4, 1, 5), (0,), COLUMNS, (1, 4, 5)),
    ((4, 1, 5), (1, 2), ROWS, (1, 4, 5)),
    ((1, 5), (0,), ELEMENTWISE, (1, 1, 5)),
    ((1, 5), (1,), ROWS, (1, 1, 5)),
    ((5, 1), (1,), ELEMENTWISE, (1, 1, 5)),
    ((1, 1), (0, 1), ROWS, (1, 1, 1)),
    ((1, 1), (), ELEMENTWISE, (1, 1, 1)),
]
by_shape = pytest.mark.parametrize(("shape", "reduce_dims", "rule", "matrix"), SHAPES)

# an lr that lets b grow to several, and all coefficients off their defaults
HYPER: list[dict[str, Any]] = [
    dict(eta=0.7),
    dict(eta=0.3, beta=0.9, c_coef=0.5, d_coef=0.4, extra_l2=0.02, momentum=0.8, clip_value=1.0),
]
STEPS = 12
LRS = [0.4 * (1 + 0.5 * math.cos(t / 4)) for t in range(STEPS)]

# Largest difference over largest value, in float64 through 12 steps: what the last bit of beta^t is in the
# first 1 - beta^t, times a few.
TOLERANCE = 2e-14


def kept(shape: tuple[int, ...], reduce_dims: Dims) -> tuple[int, ...]:
    dims = range(len(shape)) if reduce_dims is None else [d % len(shape) for d in reduce_dims]
    return tuple(1 if d in dims else size for d, size in enumerate(shape))


def start(shape: tuple[int, ...]) -> torch.Tensor:
    return values(shape, 0, wild=False).double()


def gradient(shape: tuple[int, ...], t: int) -> torch.Tensor:
    return values(shape, t + 1, wild=False).double()


@pytest.fixture(scope="module")
def authors(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> dict[Any, dict[str, np.ndarray]]:
    """What jestimator makes of the shapes and hyper-parameters that tests are run with, in one process."""
    names = ("shape", "reduce_dims", "i")
    found = [getattr(item, "callspec", None) for item in request.session.items]
    of_tests = [spec.params for spec in found if spec and "i" in spec.params and "reduce_dims" in spec.params]
    keys = list(dict.fromkeys(tuple(params[name] for name in names) for params in of_tests))
    runs = []
    for shape, dims, i in keys:
        gradients = np.stack([gradient(shape, t).numpy() for t in range(STEPS)])
        runs.append(
            Run("amos", start(shape).numpy(), gradients, LRS, dict(HYPER[i], shape=kept(shape, dims)))
        )
    return dict(zip(keys, trajectories(tmp_path_factory.mktemp("amos"), runs), strict=True))


def assert_same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    error = (ours - theirs).abs().max()
    assert error <= TOLERANCE * theirs.abs().max(), error / theirs.abs().max()


@pytest.mark.parametrize(
    ("shape", "reduce_dims", "rule", "matrix", "i"),
    [
        pytest.param(*shape, i, marks=pytest.mark.full if (i + j) % 2 else ())
        for i in range(len(HYPER))
        for j, shape in enumerate(SHAPES)
    ],
)
def test_equals_the_authors_code(
    shape: tuple[int, ...], reduce_dims: Dims, rule: str, matrix: Matrix, i: int, authors: Any
) -> None:
    theirs = authors[shape, reduce_dims, i]
    p = torch.nn.Parameter(start(shape))
    opt = danlu.Amos([p], lr=0.1, reduce_dims=reduce_dims, **HYPER[i])
    for t, lr in enumerate(LRS):
        opt.param_groups[0]["lr"] = lr
        p.grad = gradient(shape, t)
        opt.step()
        assert_same(p.detach(), torch.tensor(theirs["p"][t]))
    for name in opt.states(opt.param_groups[0], shape):
        assert opt.state[p][name].shape == theirs[name].shape
        sign = -1 if name == "exp_avg" else 1  # optax adds what it averages
        assert_same(opt.state[p][name], sign * torch.tensor(theirs[name]))
    assert opt.state[p]["decay"].max() > 1


@by_shape
def test_how_kernels_see_it(shape: tuple[int, ...], reduce_dims: Dims, rule: str, matrix: Matrix) -> None:
    for momentum, ending in ((None, ""), (0.0, ""), (0.9, "_momentum")):
        opt = danlu.Amos([torch.zeros(shape)], lr=0.1, reduce_dims=reduce_dims, momentum=momentum)
        (group,) = opt.param_groups
        assert (opt.rule(group, shape), opt.matrix(group, shape)) == (rule + ending, matrix)
        assert list(opt.fold(group, 1.0, 0.0)) == COEFFICIENTS
        expected = {name: kept(shape, reduce_dims) for name in ("variance", "decay")}
        found = {name: reduced_shape(shape, dims) for name, dims in opt.states(group, shape).items()}
        assert found == (expected | {"exp_avg": shape} if momentum else expected)


COEFFICIENTS = [
    *("beta", "weight", "correction", "xi_squared", "c_rate", "d_rate"),
    *("scale", "extra_l2", "clip", "momentum", "momentum_weight"),
]


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize(
    ("shape", "eta"), [((7,), 0.5), ((6, 5), (2 / 5) ** 0.5), ((3, 4, 2, 2), (1 / 4) ** 0.5)]
)
def test_equals_pytorch_optimizer(shape: tuple[int, ...], eta: float, momentum: float) -> None:
    """It knows one v and b for each parameter, and reads eta off the shape."""
    p, q = (torch.nn.Parameter(start(shape)) for _ in range(2))
    ours = danlu.Amos([p], lr=0.4, eta=eta, momentum=momentum)
    theirs = pytorch_optimizer.Amos([q], lr=0.4, momentum=momentum, eps=0.0)
    for t in range(STEPS):
        p.grad, q.grad = gradient(shape, t), gradient(shape, t)
        ours.step()
        theirs.step()
        assert_same(p.detach(), q.detach())


@pytest.mark.pairs
@each_backend
@pytest.mark.parametrize("momentum", [None, 0.9])
@pytest.mark.parametrize("reduce_dims", [None, (), (-1,), (0,)], ids=str)
def test_fp32_as_float64(reduce_dims: Dims, momentum: float | None, backend: str) -> None:
    make = partial(
        danlu.Amos, lr=0.1, eta=0.5, momentum=momentum, reduce_dims=reduce_dims, extra_l2=0.01, clip_value=1.5
    )
    shapes = [(1,), (33,), (0,), (3, 0), (0, 3), (70, 257), (5, 3, 2), (3, 100_001), (50_001, 3)]
    assert_as_in_float64(make, shapes, backend)


@each_backend
def test_groups_of_every_kind(backend: str) -> None:
    """As optimizers of their own."""
    settings: list[dict[str, Any]] = [dict(), dict(reduce_dims=()), dict(reduce_dims=[1], eta=0.1)]
    settings += [{**s, "momentum": 0.5, "lr": 0.2} for s in settings] + [dict(clip_value=0.1)]
    together, apart = some_params(len(settings)), some_params(len(settings))
    groups = [dict(params=[p], **setting) for p, setting in zip(together, settings, strict=True)]
    train(danlu.Amos(groups, lr=0.1, backend=backend), range(4))
    several = [
        danlu.Amos([p], **{"lr": 0.1, "backend": backend, **setting})
        for p, setting in zip(apart, settings, strict=True)
    ]
    for t in range(4):
        for i, p in enumerate(apart):
            p.grad = values(p.shape, 100 * t + i, wild=False)
        for opt in several:
            opt.step()
    assert all(map(same_bits, together, apart))


def test_without_means_the_bits_are_the_references() -> None:
    for momentum in (None, 0.9):
        make = partial(danlu.Amos, lr=0.1, reduce_dims=(), momentum=momentum, clip_value=1.0, extra_l2=0.01)
        found = []
        for backend in ("reference", "cpu"):
            params = [torch.nn.Parameter(values((300, 7), i, wild=bool(i))) for i in range(2)]
            opt = make(params, backend=backend)
            for t in range(6):
                for i, p in enumerate(params):
                    p.grad = values(p.shape, 10 * (t + 1) + i, wild=bool(i))
                opt.step()
            found.append(everything(opt))
        assert all_same(*found)


@each_backend
@pytest.mark.parametrize("reduce_dims", [None, (), (1,), (0,)], ids=str)
def test_zero_gradients(reduce_dims: Dims, backend: str) -> None:
    """Nothing to divide by: nothing moves, and nothing is NaN; a gradient that comes later counts."""
    p = torch.nn.Parameter(values((4, 5), 0, wild=False))
    before = p.detach().clone()
    opt = danlu.Amos([p], lr=0.1, reduce_dims=reduce_dims, momentum=0.5, backend=backend)
    p.grad = torch.zeros(4, 5)
    for _ in range(3):
        opt.step()
    assert p.equal(before)
    assert not any(opt.state[p][name].any() for name in opt.state_names)
    p.grad[2, 3] = 1.0
    opt.step()
    assert not p.isnan().any()
    assert p[2, 3] != before[2, 3]


# reduce_dims, and how many elements of (4, 5) share a statistic with the one that is NaN
@each_backend
@pytest.mark.parametrize(("reduce_dims", "spoiled"), [(None, 20), ((), 1), ((1,), 5), ((0,), 4)], ids=str)
@pytest.mark.parametrize("clip_value", [None, 1.0])
def test_nan_shows(reduce_dims: Dims, spoiled: int, clip_value: float | None, backend: str) -> None:
    p = torch.nn.Parameter(values((4, 5), 0, wild=False))
    p.grad = values((4, 5), 1, wild=False)
    p.grad[1, 2] = math.nan
    opt = danlu.Amos([p], lr=0.1, reduce_dims=reduce_dims, clip_value=clip_value, backend=backend)
    opt.step()
    assert p.isnan().sum() == spoiled


@each_backend
@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 3), (2, 0, 3)])
@pytest.mark.parametrize("momentum", [None, 0.9])
def test_empty_tensors_leave_no_nan(shape: tuple[int, ...], momentum: float | None, backend: str) -> None:
    for reduce_dims in (None, (), (-1,), (0,)):
        for dtype in (F32, F64):
            p = torch.nn.Parameter(torch.zeros(shape, dtype=dtype))
            p.grad = torch.zeros_like(p)
            opt = danlu.Amos(
                [p],
                lr=0.1,
                momentum=momentum,
                reduce_dims=reduce_dims,
                backend=backend if dtype == F32 else "reference",
            )
            opt.step()
            assert opt.state[p]["step"] == 1
            assert not any(t.isnan().any() for t in everything(opt))


@each_backend
def test_statistics_are_never_low_precision(backend: str) -> None:
    p = torch.nn.Parameter(values((4, 5), 0, wild=False).to(BF16))
    p.grad = values((4, 5), 1, wild=False).to(BF16)
    opt = danlu.Amos([p], lr=0.1, momentum=0.9, state_dtype=BF16, reduce_dims=(1,), backend=backend)
    opt.step()
    assert {name: opt.state[p][name].dtype for name in opt.state_names} == dict(
        variance=F32, decay=F32, exp_avg=BF16
    )


@each_backend
def test_settings_may_change_between_steps(backend: str) -> None:
    """The plan in use must see it: loading is what makes a new one."""
    changes: list[dict[str, Any]] = [
        dict(momentum=0.9),
        dict(clip_value=0.1),
        dict(eta=0.2),
        dict(momentum=None),
    ]

    def changed(load: bool) -> list[torch.Tensor]:
        params = some_params()
        opt = danlu.Amos(params, lr=0.1, reduce_dims=(1,), backend=backend)
        for t, change in enumerate(changes):
            train(opt, [t])
            opt.param_groups[0].update(change)
            if load:
                opt.load_state_dict(opt.state_dict())
        train(opt, [len(changes)])
        return copies(opt)

    assert all_same(changed(load=False), changed(load=True))


@each_backend
def test_other_dimensions_need_other_states(backend: str) -> None:
    p = torch.nn.Parameter(values((4, 5), 0, wild=False))
    opt = danlu.Amos([p], lr=0.1, reduce_dims=(1,), backend=backend)
    train(opt, range(1))
    opt.param_groups[0]["reduce_dims"] = (0,)
    before = copies(opt)
    with pytest.raises(ValueError, match=r"'variance' has shape \(4, 1\).*needs \(1, 5\)"):
        train(opt, range(1))
    assert all_same(copies(opt), before)


@each_backend
@pytest.mark.parametrize("reduce_dims", [None, (), (-1,), (0,)], ids=str)
def test_resumes_exactly(reduce_dims: Dims, backend: str) -> None:
    make = partial(danlu.Amos, lr=0.1, reduce_dims=reduce_dims, momentum=0.9)
    assert_resumes(make, [(7,), (30, 50), (2, 0)], backend)


@pytest.mark.parametrize("reduce_dims", [(1,), (2, 3), (0, 2), (-4,)], ids=str)
def test_dimensions_that_a_parameter_has_not(reduce_dims: tuple[int, ...]) -> None:
    """Only the step meets a parameter: those of a group need not have the same dimensions."""
    good, bad = torch.nn.Parameter(torch.ones(2, 3, 4, 5)), torch.nn.Parameter(torch.ones(3))
    opt = danlu.Amos([("good", good), ("bad", bad)], lr=0.1, reduce_dims=reduce_dims)
    good.grad, bad.grad = torch.ones(2, 3, 4, 5), torch.ones(3)
    with pytest.raises(ValueError, match=r"^bad: reduce_dims must be dimensions of .* which has 1, got"):
        opt.step()
    assert good.eq(1).all()


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("lr", -1.0, "lr must be finite and at least 0"),
        ("eta", -0.1, "eta must be finite and at least 0"),
        ("eta", None, "eta must be a number"),
        ("beta", 1.0, r"beta must be in \[0, 1\)"),
        ("c_coef", -1.0, "c_coef must be finite and at least 0"),
        ("d_coef", math.inf, "d_coef must be finite and at least 0"),
        ("extra_l2", -1.0, "extra_l2 must be finite and at least 0"),
        ("momentum", 1.0, r"momentum must be in \[0, 1\)"),
        ("momentum", -0.5, r"momentum must be in \[0, 1\)"),
        ("clip_value", -1.0, "clip_value must be finite and at least 0"),
        ("clip_value", 0.0, "clip_value must be greater than 0, got 0; None turns it off"),
        ("reduce_dims", 1, "reduce_dims must be a tuple of integers or None, got 1"),
        ("reduce_dims", (0.0,), "reduce_dims must be a tuple of integers or None"),
        ("reduce_dims", (True,), "reduce_dims must be a tuple of integers or None"),
        ("reduce_dims", "all", "reduce_dims must be a tuple of integers or None, got 'all'"),
    ],
)
def test_settings_out_of_range(setting: str, value: Any, message: str) -> None:
    p = torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(ValueError, match=message):
        danlu.Amos([p], **{"lr": 0.1, setting: value})
    with pytest.raises(ValueError, match=message):
        danlu.Amos([{"params": [p], setting: value}], lr=0.1)


def test_lr_has_no_default() -> None:
    with pytest.raises(TypeError, match="lr"):
        danlu.Amos([torch.nn.Parameter(torch.zeros(2))])  # type: ignore[call-arg]
