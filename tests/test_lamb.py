"""LAMB against optax and timm, and what its ratio of norms does at zeros and NaN."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

import danlu
from cases import F64, values
from oracles.itself import assert_as_in_float64, assert_resumes, normwise
from oracles.jax_optimizers import Run, trajectories
from oracles.submodules import load
from training import give_gradients

BACKENDS = ["reference", "cpu"]
each_backend = pytest.mark.parametrize("backend", BACKENDS)

Lamb: Any = load("timm.optim.lamb").Lamb  # type: ignore[attr-defined]

# Largest difference over largest value, in float64 through 12 steps: ulps of norms and parameters.
TOLERANCE = 2e-15
STEPS = 12
LRS = [0.1 * (1 + math.cos(t / 4)) for t in range(STEPS)]

SHAPES = [(), (1,), (7,), (6, 5), (3, 4, 5)]
ZERO = torch.zeros(4, 3, dtype=F64)
STARTS = [*(values(shape, i, wild=False).double() for i, shape in enumerate(SHAPES)), ZERO, ZERO + 0.5]
NO_GRADIENT = len(STARTS) - 1  # its gradients are zeros

OPTAX = [
    dict(betas=(0.9, 0.999), eps=1e-6, weight_decay=0.01),
    dict(betas=(0.7, 0.95), eps=0.5, weight_decay=0.3),
    dict(betas=(0.0, 0.9), eps=1e-6, weight_decay=0.0),
]


def adapted_adamw(params: Any, **hyper: Any) -> danlu.LayerAdaptation:
    """The same mechanism around another rule."""
    return danlu.LayerAdaptation(danlu.AdamW(params, **{"eps": 1e-6, **hyper}))


both = pytest.mark.parametrize("lamb", [danlu.LAMB, adapted_adamw])


def gradients(t: int) -> list[torch.Tensor]:
    found = [values(p.shape, 100 * (t + 1) + i, wild=False).double() for i, p in enumerate(STARTS)]
    found[NO_GRADIENT] = torch.zeros_like(found[NO_GRADIENT])
    return found


def assert_same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    error = (ours - theirs).abs().max()
    assert error <= TOLERANCE * theirs.abs().max(), error / theirs.abs().max()


@pytest.fixture(scope="module")
def optax(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What it makes of every start with every hyper-parameters."""
    steps = [gradients(t) for t in range(STEPS)]
    runs = [
        Run("lamb", p.numpy(), torch.stack([g[i] for g in steps]).numpy(), LRS, hyper)
        for hyper in OPTAX
        for i, p in enumerate(STARTS)
    ]
    return trajectories(tmp_path_factory.mktemp("lamb"), runs)


@both
def test_equals_optax(lamb: Callable[..., danlu.FusedOptimizer], optax: Any) -> None:
    steps, results = [gradients(t) for t in range(STEPS)], iter(optax)
    for hyper in OPTAX:
        params = [torch.nn.Parameter(p.clone()) for p in STARTS]
        opt = lamb(params, **hyper)
        theirs = [next(results) for _ in params]
        for t, lr in enumerate(LRS):
            opt.param_groups[0]["lr"] = lr
            for p, g in zip(params, steps[t], strict=True):
                p.grad = g
            opt.step()
            for p, result in zip(params, theirs, strict=True):
                assert_same(p.detach(), torch.tensor(result["p"][t]))
        for p, result in zip(params, theirs, strict=True):
            for name in opt.state_names:
                assert_same(opt.state[p][name], torch.tensor(result[name]))


@pytest.mark.parametrize(
    ("lamb", "hyper"),
    [
        (danlu.LAMB, dict()),
        (danlu.LAMB, dict(trust_clip=True)),
        (danlu.LAMB, dict(bias_correction=False)),
        (danlu.LAMB, dict(always_adapt=False)),
        (
            danlu.LAMB,
            dict(always_adapt=False, trust_clip=True, bias_correction=False, betas=(0.8, 0.9), eps=1e-3),
        ),
        (danlu.LAMB, dict(max_grad_norm=3.0)),
        (danlu.LAMB, dict(max_grad_norm=1e6)),
        (adapted_adamw, dict()),
        (adapted_adamw, dict(max_grad_norm=3.0)),
    ],
    ids=lambda x: x.__name__ if callable(x) else str(x),
)
def test_equals_timm(lamb: Callable[..., danlu.FusedOptimizer], hyper: dict[str, Any]) -> None:
    def groups() -> list[dict[str, Any]]:
        copies = [torch.nn.Parameter(p.clone()) for p in STARTS]
        return [
            dict(params=copies[::2], weight_decay=0.1),
            dict(params=copies[1::2], weight_decay=0.0, lr=0.02),
        ]

    ours = lamb(groups(), **hyper)
    theirs = Lamb(groups(), **{"max_grad_norm": None, "always_adapt": True, **hyper})
    for t, lr in enumerate(LRS):
        for opt in (ours, theirs):
            opt.param_groups[0]["lr"] = lr
            split = gradients(t)
            for group, given in zip(opt.param_groups, (split[::2], split[1::2]), strict=True):
                for p, g in zip(group["params"], given, strict=True):
                    p.grad = g
            opt.step()
        for a, b in zip(ours.param_groups, theirs.param_groups, strict=True):
            for p, q in zip(a["params"], b["params"], strict=True):
                assert_same(p.detach(), q.detach())


@each_backend
@pytest.mark.parametrize(
    "hyper",
    [
        dict(weight_decay=0.1),
        dict(weight_decay=0.0, always_adapt=False),
        dict(trust_clip=True),
        dict(bias_correction=False, betas=(0.8, 0.9)),
        dict(max_grad_norm=2.0, maximize=True),
    ],
    ids=str,
)
def test_fp32_as_float64(backend: str, hyper: dict[str, Any]) -> None:
    make = partial(danlu.LAMB, lr=0.01, **hyper)
    assert_as_in_float64(make, [(), (1,), (33,), (0,), (70, 257), (5, 3, 2), (300_001,)], backend)


def adamw(params: list[torch.nn.Parameter], **hyper: Any) -> danlu.AdamW:
    """LAMB without its ratio."""
    return danlu.AdamW(params, lr=0.1, eps=1e-6, **hyper)


# what the parameter and its gradient are, and whether the ratio then is 1
EDGES: dict[str, tuple[Callable[[torch.Tensor], Any], Callable[[torch.Tensor], Any]]] = {
    "zero parameter": (lambda p: p.zero_(), lambda g: g),
    "NaN in the gradient": (lambda p: p, lambda g: g.view(-1)[3:4].fill_(math.nan)),
    "NaN in the parameter": (lambda p: p.view(-1)[3:4].fill_(math.nan), lambda g: g),
}


@each_backend
@pytest.mark.parametrize("trust_clip", [False, True])
@pytest.mark.parametrize("edge", EDGES)
def test_the_ratio_is_one(edge: str, trust_clip: bool, backend: str) -> None:
    """Also with NaN, which stays where it is."""
    change_p, change_g = EDGES[edge]
    results = []
    for make in (partial(danlu.LAMB, lr=0.1, trust_clip=trust_clip), adamw):
        start, g = 10 * values((4, 5), 0, wild=False), values((4, 5), 1, wild=False)
        change_p(start)
        change_g(g)
        p = torch.nn.Parameter(start)
        p.grad = g
        make([p], weight_decay=0.1, backend=backend).step()
        results.append(p.detach())
    ours, theirs = results
    assert ours.isnan().sum() == ("NaN" in edge)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0, equal_nan=True)


@each_backend
def test_without_gradient_and_decay_nothing_moves(backend: str) -> None:
    p = torch.nn.Parameter(values((4, 5), 0, wild=False))
    p.grad = torch.zeros(4, 5)
    before = p.detach().clone()
    danlu.LAMB([p], weight_decay=0.0, backend=backend).step()
    assert p.equal(before)


@each_backend
def test_the_step_is_relative_to_the_parameter(backend: str) -> None:
    """|p - new p| = lr * |p|, and with trust_clip never more than lr * |u|."""
    for scale in (1e-3, 1.0, 1e3):
        start = scale * values((30, 40), 0, wild=False)
        for clip in (False, True):
            p = torch.nn.Parameter(start.clone())
            p.grad = values((30, 40), 1, wild=False)
            danlu.LAMB([p], lr=0.01, weight_decay=0.0, trust_clip=clip, backend=backend).step()
            # the first u of Adam has elements of 1
            length = min(start.norm().item(), 1200**0.5) if clip else start.norm().item()
            assert (p.detach() - start).norm().item() == pytest.approx(0.01 * length, rel=2e-3)


@each_backend
def test_settings_may_change_between_steps(backend: str) -> None:
    def stepped(backend: str) -> torch.Tensor:
        p = torch.nn.Parameter(10 * values((4, 5), 0, wild=False))
        opt = danlu.LAMB([p], lr=0.1, backend=backend)
        for t, name in enumerate(["trust_clip", "bias_correction", "always_adapt"]):
            give_gradients([p], t)
            opt.step()
            opt.param_groups[0][name] = not opt.param_groups[0][name]
        opt.param_groups[0]["weight_decay"] = 0.0
        give_gradients([p], 5)
        opt.step()
        return p.detach()

    assert normwise(stepped(backend), stepped("reference")) < 1e-6


@each_backend
def test_resumes_exactly(backend: str) -> None:
    assert_resumes(partial(danlu.LAMB, lr=0.1), [(), (7,), (30, 50), (2, 0)], backend)


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("lr", -1.0, "lr must be finite and at least 0"),
        ("betas", (1.0, 0.9), r"betas\[0\] must be in \[0, 1\)"),
        ("betas", (0.9, 1.0), r"betas\[1\] must be in \[0, 1\)"),
        ("eps", -1e-6, "eps must be finite and at least 0"),
        ("weight_decay", math.nan, "weight_decay must be finite and at least 0"),
        ("bias_correction", None, "bias_correction must be one of False, True, got None"),
        ("trust_clip", 10.0, r"trust_clip must be one of False, True, got 10\.0"),
        ("always_adapt", "yes", "always_adapt must be one of False, True, got 'yes'"),
    ],
)
def test_settings_out_of_range(setting: str, value: Any, message: str) -> None:
    p = torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(ValueError, match=message):
        danlu.LAMB([p], **{setting: value})
    with pytest.raises(ValueError, match=message):
        danlu.LAMB([{"params": [p], setting: value}])
