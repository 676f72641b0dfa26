"""Rules of one's own: what the engine does for danlu's it does for them."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from test_triton_bits import NATIVE

import danlu
from cases import STORAGES, Case, Storage
from danlu.formula import sqrt
from runs import assert_same, run
from training import all_same, everything, some_params, train

# what converts knows no rule
FORMATS = [
    s if s in (STORAGES[0], STORAGES[3]) else pytest.param(s, marks=pytest.mark.full) for s in STORAGES
]


@triton.jit
def slow_and_fast(p, g, states, coefficients):
    fast, slow, v = states
    beta1, weight1, beta3, weight3, beta2, weight2, lr, alpha, eps, decay = coefficients
    fast = beta1 * fast + weight1 * g
    slow = beta3 * slow + weight3 * g
    v = beta2 * v + weight2 * (g * g)
    amount = lr * tl.div_rn(fast + alpha * slow, tl.sqrt_rn(v) + eps)
    return amount + decay * p, (fast, slow, v)


def reference(
    p: torch.Tensor,
    g: torch.Tensor,
    fast: torch.Tensor,
    slow: torch.Tensor,
    v: torch.Tensor,
    *,
    step: float,
    lr: float,
    betas: tuple[float, float, float],
    alpha: float,
    eps: float,
    weight_decay: float,
) -> torch.Tensor:
    """Adam with a second, slower average (after AdEMAMix, arXiv:2409.03137)."""
    beta1, beta2, beta3 = betas
    fast.mul_(beta1).add_(g * (1 - beta1))
    slow.mul_(beta3).add_(g * (1 - beta3))
    v.mul_(beta2).add_((g * g) * (1 - beta2))
    rate = lr * (1 - beta2**step) ** 0.5 / (1 - beta1**step)
    return (fast + slow * alpha) / (sqrt(v) + eps) * rate + p * (lr * weight_decay)


def coefficients(
    math: Any, *, step: Any, lr: Any, betas: Any, alpha: Any, eps: Any, weight_decay: Any
) -> dict[str, Any]:
    beta1, beta2, beta3 = betas
    rate = lr * math.sqrt(1 - math.pow(beta2, step)) / (1 - math.pow(beta1, step))
    weights = dict(
        beta1=beta1, weight1=1 - beta1, beta3=beta3, weight3=1 - beta3, beta2=beta2, weight2=1 - beta2
    )
    return dict(**weights, lr=rate, alpha=alpha, eps=eps, decay=lr * weight_decay)


DEFAULTS = dict(lr=1e-3, betas=(0.9, 0.99, 0.999), alpha=2.0, eps=1e-8, weight_decay=0.1)
STATES = ["exp_avg", "exp_avg_slow", "exp_avg_sq"]
SlowAndFast = danlu.custom(
    "SlowAndFast",
    states=STATES,
    defaults=DEFAULTS,
    reference=reference,
    coefficients=coefficients,
    triton_rule=slow_and_fast,
)


@pytest.mark.parametrize("capturable", [False, True], ids=["host", "device"])
@pytest.mark.parametrize("storage", FORMATS, ids=lambda s: s.id)
def test_same_bits(storage: Storage, capturable: bool) -> None:
    case = Case("slow-and-fast", SlowAndFast, dict(lr=2e-3))
    results = [
        run(case, storage, backend, wild=False, steps=3, layouts=NATIVE, capturable=capturable)
        for backend in ("triton", "reference")
    ]
    assert_same(*results, NATIVE)


@pytest.mark.parametrize("capturable", [False, True], ids=["host", "device"])
def test_layer_adaptation_of_it(capturable: bool) -> None:
    """By its kernel, close to the reference; and another rule's is another kernel."""
    case = Case("slow-and-fast", SlowAndFast, dict(lr=2e-3), adapted=True)
    assert {row.backend for row in case.make(some_params(), backend="triton").backend_report()} == {"triton"}
    results = [
        run(case, STORAGES[0], backend, wild=False, steps=3, layouts=NATIVE, capturable=capturable)
        for backend in ("triton", "reference")
    ]
    for got, want in zip(*results, strict=True):
        assert all(case.agrees(got[key], want[key]) for key in want)


def test_who_takes_it() -> None:
    p, q = some_params(2)
    p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
    by_kernel = SlowAndFast([p], backend="triton")
    assert [row.backend for row in by_kernel.backend_report()] == ["triton"]
    options: dict[str, Any] = dict(states=STATES, defaults=DEFAULTS, reference=reference)
    plain = danlu.custom("Plain", coefficients=coefficients, **options)([q], backend="triton")
    (row,) = plain.backend_report()
    assert row.backend == "reference"
    assert "no Triton rule" in row.reason


def test_a_name_of_danlus_own_brings_no_kernel_of_danlus() -> None:
    def halved(p: torch.Tensor, g: torch.Tensor, m: torch.Tensor, *, step: float, lr: float) -> torch.Tensor:
        return p * 0.5

    lion = danlu.custom(
        "Lion",
        states=["exp_avg"],
        defaults=dict(lr=1.0),
        reference=halved,
        coefficients=lambda math, *, step, lr: dict(lr=lr),
    )
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    lion([p]).step()
    assert p.tolist() == [0.5] * 3


def test_it_is_an_optimizer_like_the_others() -> None:
    """state_dict, deepcopy, pickling; lr by position; options of the engine."""
    opt = SlowAndFast(some_params(), 0.1, betas=(0.5, 0.9, 0.99), backend="triton", max_grad_norm=1.0)
    train(opt, range(2))
    (group,) = opt.param_groups
    assert (group["lr"], group["betas"], group["alpha"]) == (0.1, (0.5, 0.9, 0.99), 2.0)
    assert list(opt.state[group["params"][0]]) == [*STATES, "step"]
    others = [copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))]
    train(opt, range(2, 4))
    for other in others:
        train(other, range(2, 4))
        assert all_same(everything(opt), everything(other))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(states=[]), "states must be a list of at least one name"),
        (dict(states="exp_avg"), "states must be a list"),
        (dict(states=["a.b"]), "states must be identifiers"),
        (dict(states=["step"]), "states must be identifiers other than"),
        (dict(states=["a", "a"]), "states must differ"),
        (dict(defaults=dict(betas=(0.9, 0.99, 0.999))), "defaults must have 'lr'"),
        (dict(defaults=dict(DEFAULTS, maximize=True)), "defaults must not name maximize"),
        (dict(defaults=dict(DEFAULTS, extra=1)), "must name the same hyper-parameters, not {'extra'}"),
    ],
)
def test_what_is_wrong_is_named(change: dict[str, Any], message: str) -> None:
    options: dict[str, Any] = dict(
        states=STATES, defaults=DEFAULTS, reference=reference, coefficients=coefficients
    )
    with pytest.raises(ValueError, match=message):
        danlu.custom("Wrong", **{**options, **change})


def test_a_bad_lr_is_refused() -> None:
    with pytest.raises(ValueError, match="lr must be finite"):
        SlowAndFast(some_params(), lr=-1.0)
    with pytest.raises(TypeError, match="momentum"):
        SlowAndFast(some_params(), momentum=0.5)  # type: ignore[call-arg]
