"""The references in float64, and the native kernels in fp32, against implementations from elsewhere."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lion_pytorch
import pytest
import pytorch_optimizer
import torch

import danlu
from cases import CASES, F32, F64, Case, values
from danlu.testing import same_bits
from oracles.accumulated import Accumulated
from oracles.adax import PaperAdaX
from oracles.optax_lion import lion as optax_lion

INF, NAN = float("inf"), float("nan")


def tiger(params: Sequence[torch.Tensor], accumulation_steps: int = 1, **hyper: Any) -> Accumulated:
    return Accumulated(pytorch_optimizer.Tiger, params, accumulation_steps, **hyper)


# an oracle takes the parameters of one group and its settings; it has param_groups, state and step()
ORACLES: dict[type[danlu.FusedOptimizer], Callable[..., Any]] = {
    danlu.Lion: lion_pytorch.Lion,
    danlu.Tiger: tiger,
    danlu.Adam: torch.optim.Adam,
    danlu.AdamW: torch.optim.AdamW,
    danlu.AdaX: partial(PaperAdaX, decoupled=False),
    danlu.AdaXW: partial(PaperAdaX, decoupled=True),
}

# Largest difference over largest value of a tensor, through 24 updates that are as large as the parameter.
# float64: a few ulps, not one for each update. fp32: the same few, of coefficients, states and parameters.
TOLERANCE = {F64: 3e-15, F32: 1e-6}

UPDATES = 24  # every accumulation_steps used here divides it
SIZE = 25
GRADIENT_SCALES = (1e-9, 1e-3, 1.0, 1e6)  # one tensor each; eps is nothing beside the last

by_id = partial(pytest.mark.parametrize, ids=lambda c: c.id)
every_case = by_id("case", [c for c in CASES if c.optimizer in ORACLES])
every_adax = by_id("case", [c for c in CASES if issubclass(c.optimizer, danlu.AdaX)])
every_dtype = pytest.mark.parametrize("dtype", [F64, F32], ids=["reference-f64", "cpu-f32"])


@by_id("case", CASES)
def test_every_optimizer_has_an_oracle(case: Case) -> None:
    assert case.optimizer in ORACLES


@every_case
@every_dtype
def test_same_trajectory(case: Case, dtype: torch.dtype) -> None:
    race = Race(case.optimizer, [case.hyper], dtype)
    race.run(UPDATES)
    race.check()


@every_case
@every_dtype
def test_groups_with_settings_of_their_own(case: Case, dtype: torch.dtype) -> None:
    momentum = dict(beta=0.7) if case.optimizer is danlu.Tiger else dict(betas=(0.7, 0.3))
    others = [dict(lr=5e-3, weight_decay=0.0), dict(maximize=True), dict(momentum, lr=1e-3, maximize=True)]
    race = Race(case.optimizer, [case.hyper, *({**case.hyper, **other} for other in others)], dtype)
    race.run(UPDATES)
    race.check()


@pytest.mark.pairs
@every_case
@every_dtype
@pytest.mark.parametrize("kind", [float, torch.tensor])
def test_lr_may_change_at_every_step(case: Case, dtype: torch.dtype, kind: Callable[[float], Any]) -> None:
    race = Race(case.optimizer, [{**case.hyper, "lr": kind(case.hyper["lr"])}], dtype)
    race.run(UPDATES, lrs=[case.hyper["lr"] * (1 + math.cos(i / 4)) for i in range(UPDATES)])
    race.check()


def test_lion_equals_optax(tmp_path: Path) -> None:
    race = Race(danlu.Lion, [dict(lr=3e-3, betas=(0.8, 0.95), weight_decay=0.1)], F64)
    start = torch.cat(race.ours.param_groups[0]["params"]).detach()
    lrs = [3e-3 * (1 + math.cos(i / 4)) for i in range(UPDATES)]
    race.run(UPDATES, lrs=lrs)
    gradients = torch.stack([torch.cat(gradients) for gradients in race.gradients])
    p, m = optax_lion(tmp_path, start.numpy(), gradients.numpy(), lrs, (0.8, 0.95, 0.1))
    sizes = [len(p) for p in race.ours.param_groups[0]["params"]]
    theirs = zip(torch.tensor(p).split(sizes), torch.tensor(m).split(sizes), strict=True)
    for ours, (p_theirs, m_theirs) in zip(race.ours.param_groups[0]["params"], theirs, strict=True):
        assert difference(ours, p_theirs) < TOLERANCE[F64]
        assert difference(race.ours.state[ours]["exp_avg"], m_theirs) < TOLERANCE[F64]


@every_dtype
@pytest.mark.parametrize("k", [1, 2, 3, 8])
def test_tiger_accumulates_to_one_step_on_the_mean(k: int, dtype: torch.dtype) -> None:
    race = Race(danlu.Tiger, [dict(lr=3e-3, beta=0.9, weight_decay=0.1, accumulation_steps=k)], dtype)
    race.run(UPDATES)
    race.check()
    assert race.updates() == UPDATES // k


# 886,000: the paper's form leaves fp32's range soon after; 7,098,170: expm1 leaves float64's
@pytest.mark.pairs
@every_adax
@every_dtype
@pytest.mark.parametrize("t", [1_000, 100_000, 886_000, 999_990, 7_098_170, 12_000_000])
def test_adax_late(case: Case, dtype: torch.dtype, t: int) -> None:
    hyper = {**case.hyper, "betas": (0.9, 1e-4)}
    race = Race(case.optimizer, [hyper], dtype)
    race.start_late(t)
    race.run(UPDATES)
    race.check()
    assert race.updates() == t + UPDATES


@pytest.mark.pairs
@every_adax
@every_dtype
@pytest.mark.parametrize("beta2", [1e-8, 1e-12, 1e-20])
def test_adax_with_small_beta2(case: Case, dtype: torch.dtype, beta2: float) -> None:
    """1e-20 is nothing beside 1 in float64, and v the plain mean of g^2."""
    race = Race(case.optimizer, [{**case.hyper, "betas": (0.9, beta2)}], dtype)
    race.run(UPDATES)
    race.check()


def test_adax_does_not_drift() -> None:
    """v against its closed form; the paper's recursion is off by 2e-4 here in fp32, and more later."""
    steps, beta2 = 20_000, 1e-4
    gradients = values((steps, 8), 3, wild=False)
    p = torch.nn.Parameter(torch.zeros(8))
    opt = danlu.AdaX([p], lr=0.0, betas=(0.9, beta2), weight_decay=0.0, backend="cpu")
    for g in gradients:
        p.grad = g
        opt.step()
    weights = beta2 * torch.exp(math.log1p(beta2) * torch.arange(steps - 1, -1, -1, dtype=F64))
    v = weights @ gradients.double().square() / math.expm1(steps * math.log1p(beta2))
    # half an ulp for each of the 1 / beta2 steps that v remembers, to either side
    assert difference(opt.state[p]["exp_avg_sq"], v) < 2e-5


# where S without expm1 is wrong by more than fp32 hides
SMALL_BETA2 = [
    Case(f"{c.id}-small-beta2", c.optimizer, {**c.hyper, "betas": (0.9, 1e-12)})
    for c in CASES
    if issubclass(c.optimizer, danlu.AdaX)
]


@by_id("case", CASES + SMALL_BETA2)
def test_coefficients_fold_alike_on_floats_and_tensors(case: Case) -> None:
    """A host folds one row; a device folds all rows at once, from vectors with one entry for each."""
    opt = case.make([torch.zeros(1)])
    hyper = opt.hyper(opt.param_groups[0])
    steps = [1.0, 2.0, 10.0, 1000.0, 1e6, 1.2e7]
    micro_steps = [0.0, 1.0, 2.0, 0.0, 1.0, 2.0]
    lrs = [hyper["lr"] * factor for factor in (1.0, 0.9, 1 / 3, 1e-3, 0.0, 1e3)]

    def folded(step: Any, micro_step: Any, lr: Any) -> dict[str, Any]:
        counters = opt.counters(step, micro_step)
        return opt.coefficients(danlu.scalar, **counters, **{**hyper, "lr": lr})

    vectors = folded(*(torch.tensor(x, dtype=F64) for x in (steps, micro_steps, lrs)))
    rows = [folded(*row) for row in zip(steps, micro_steps, lrs, strict=True)]
    assert all(list(row) == list(vectors) for row in rows)
    for name, vector in vectors.items():
        on_host = torch.tensor([row[name] for row in rows], dtype=F64).to(F32)
        on_device = torch.as_tensor(vector, dtype=F64).expand(len(steps)).to(F32)
        assert same_bits(on_host, on_device), f"{name}: {on_host.tolist()}, {on_device.tolist()}"


@pytest.mark.parametrize(
    ("name", "arguments", "want"),
    [
        ("sqrt", (2.0,), 2.0**0.5),
        ("log1p", (1e-12,), 1e-12 - 0.5e-24),
        ("expm1", (1e-12,), 1e-12 + 0.5e-24),
        ("expm1", (710.0,), INF),
        ("pow", (0.999, 1000.0), 0.999**1000),
        ("maximum", (1.0, 2.0), 2.0),
        ("maximum", (2.0, 1.0), 2.0),
        ("maximum", (1.0, NAN), NAN),
        ("maximum", (NAN, 1.0), NAN),
        ("minimum", (1.0, 2.0), 1.0),
        ("minimum", (2.0, 1.0), 1.0),
        ("minimum", (1.0, NAN), NAN),
        ("minimum", (NAN, 1.0), NAN),
    ],
)
def test_scalar_arithmetic(name: str, arguments: tuple[float, ...], want: float) -> None:
    function = getattr(danlu.scalar, name)
    vectors = [torch.tensor([x, x], dtype=F64) for x in arguments]
    approximately = pytest.approx(want, rel=4e-16, abs=0.0, nan_ok=True)
    assert function(*arguments) == approximately
    assert function(*vectors).tolist() == [approximately] * 2
    assert function(vectors[0], *arguments[1:]).tolist() == [approximately] * 2


class Race:
    """A danlu optimizer, and one oracle for each of its groups, on the same parameters and gradients."""

    def __init__(
        self, optimizer: type[danlu.FusedOptimizer], groups: Sequence[dict[str, Any]], dtype: torch.dtype
    ) -> None:
        starts = [[self._start(10 * i + j) for j in range(len(GRADIENT_SCALES))] for i in range(len(groups))]
        self.dtype = dtype
        self.ours = optimizer(
            [
                dict(hyper, params=[torch.nn.Parameter(p.to(dtype)) for p in params])
                for hyper, params in zip(groups, starts, strict=True)
            ]
        )
        self.theirs = []
        self.pairs = []
        for group, params in zip(self.ours.param_groups, starts, strict=True):
            copies = [p.double() for p in params]
            hyper = {name: group[name] for name in optimizer._hyper_names}
            hyper["lr"] = float(hyper["lr"])
            self.theirs.append(ORACLES[optimizer](copies, **hyper))
            self.pairs += zip(group["params"], copies, strict=True)
        self.gradients: list[list[torch.Tensor]] = []
        self._largest = [0.0] * len(self.pairs)

    @staticmethod
    def _start(seed: int) -> torch.Tensor:
        """No larger than some updates, or these would vanish beside it; the last entry never moves."""
        p = 0.02 * values((SIZE,), seed, wild=False)
        p[-1] = 0.0
        return p

    def _gradient(self, index: int) -> torch.Tensor:
        scale = GRADIENT_SCALES[index % len(GRADIENT_SCALES)]
        g = scale * values((SIZE,), 1000 + 100 * len(self.gradients) + index, wild=False)
        g[-1] = 0.0
        return g

    def start_late(self, t: int) -> None:
        """As if t updates had been made, with what such gradients, and decay as part of them, leave.

        Smaller moments would be no history: where v hardly grows any more, the parameter would explode.
        """
        decay = 0.02 * self.ours.param_groups[0]["weight_decay"]
        scales = [max(scale, decay) for scale in GRADIENT_SCALES]
        m = [0.3 * scale * values((SIZE,), 1, wild=False) for scale in scales]
        v = [scale**2 * (0.5 + values((SIZE,), 2, wild=False).square()) for scale in scales]
        for tensor in (*m, *v):
            tensor[-1] = 0.0
        loaded = self.ours.state_dict()
        loaded["state"] = {
            i: dict(step=torch.tensor(float(t)), exp_avg=m[i].to(self.dtype), exp_avg_sq=v[i].to(self.dtype))
            for i in range(len(m))
        }
        self.ours.load_state_dict(loaded)
        self.theirs[0].start_late(t, m, v)

    def run(self, steps: int, lrs: Sequence[float] | None = None) -> None:
        for i in range(steps):
            gradients = [self._gradient(index) for index in range(len(self.pairs))]
            for (p, copy), g in zip(self.pairs, gradients, strict=True):
                p.grad, copy.grad = g.to(self.dtype), g.double()
            for group, oracle in zip(self.ours.param_groups, self.theirs, strict=True):
                if lrs is not None:
                    self._set_lr(group, lrs[i])
                oracle.param_groups[0]["lr"] = float(group["lr"])
                # by hand: not every oracle knows maximize, and pytorch_optimizer writes the gradient for it
                if group["maximize"]:
                    for copy in oracle.param_groups[0]["params"]:
                        copy.grad.neg_()
            self.ours.step()
            for oracle in self.theirs:
                oracle.step()
            self.gradients.append([g.double() for g in gradients])
            self._check_params()

    @staticmethod
    def _set_lr(group: dict[str, Any], lr: float) -> None:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr

    def _check_params(self) -> None:
        """Against the largest value so far: a parameter that shrinks keeps the roundings of its past."""
        for i, (p, copy) in enumerate(self.pairs):
            self._largest[i] = max(self._largest[i], copy.abs().max().item())
            error = difference(p, copy, self._largest[i])
            assert error < TOLERANCE[self.dtype], f"parameter {i}, step {len(self.gradients)}"

    def check(self) -> None:
        """The states too, and that the optimizer was the one meant."""
        backends = {row.backend for row in self.ours.backend_report()}
        assert backends == {"reference" if self.dtype == F64 else "cpu"}
        states = {copy: state for oracle in self.theirs for copy, state in oracle.state.items()}
        for p, copy in self.pairs:
            for name in self.ours.state_names:
                error = difference(self.ours.state[p][name], states[copy][name])
                assert error < TOLERANCE[self.dtype], name

    def updates(self) -> int:
        (steps,) = {int(state["step"]) for state in self.ours.state.values()}
        return steps


def difference(ours: torch.Tensor, theirs: torch.Tensor, largest: float | None = None) -> float:
    """Largest difference over largest value; NaN, which is below no bound, where there is one."""
    return (ours.double() - theirs).abs().max().item() / (largest or theirs.abs().max().item())
