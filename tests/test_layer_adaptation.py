"""Layer adaptation around every element-wise rule, and what the base of such optimizers shares."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

import danlu
from cases import BACKENDS, CASES, F32, F64, LAYERED, Case, values
from danlu.testing import same_bits
from danlu.update_rule import UpdateRule
from danlu.wrappers.derived import Derived
from oracles.itself import normwise
from test_oracles import ORACLES
from training import all_same, copies, everything, parameters, some_params, train

every_rule = pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
every_dtype = pytest.mark.parametrize(
    ("dtype", "backend"),
    [*((F32, backend) for backend in BACKENDS), (F64, "reference")],
    ids=lambda x: x if isinstance(x, str) else str(x).removeprefix("torch."),
    indirect=["backend"],
)
SHAPES = [(), (1,), (7,), (6, 5), (3, 4, 5), (8, 50)]
STEPS = 12
# after some steps, normwise; in float64 the oracle's step is a difference of parameters
TOLERANCE = {F32: 1e-6, F64: 1e-13}


def starts(dtype: torch.dtype = F32) -> list[torch.nn.Parameter]:
    params = [values(shape, i, wild=False) for i, shape in enumerate(SHAPES)]
    return [torch.nn.Parameter(p.to(dtype)) for p in (*params, torch.zeros(5, 3))]


def give(opt: torch.optim.Optimizer, t: int) -> None:
    """Gradients of the parameters' own dtype."""
    for i, p in enumerate(parameters(opt)):
        p.grad = values(p.shape, 100 * t + i, wild=False).to(p.dtype)


def lrs() -> list[float]:
    return [0.02 * (1 + math.cos(t / 4)) for t in range(STEPS)]


@every_rule
@every_dtype
def test_the_formula_around_rules_from_elsewhere(case: Case, dtype: torch.dtype, backend: str) -> None:
    opt = LAYERED[case.id].make(starts(dtype), backend=backend)
    theirs = [p.detach().double().flatten().clone() for p in parameters(opt)]
    hyper = {name: opt.param_groups[0][name] for name in case.optimizer._hyper_names}
    oracle = ORACLES[case.optimizer](theirs, **hyper)
    for t, lr in enumerate(lrs()):
        give(opt, t)
        opt.param_groups[0]["lr"] = oracle.param_groups[0]["lr"] = lr
        before = [q.detach().clone() for q in theirs]
        for p, q in zip(parameters(opt), theirs, strict=True):
            assert p.grad is not None
            q.grad = p.grad.double().flatten()
        opt.step()
        oracle.step()
        with torch.no_grad():
            for p, q, old in zip(parameters(opt), theirs, before, strict=True):
                amount = old - q
                size, length = old.norm(), amount.norm() / lr
                q.copy_(old - amount * (size / length if size > 0 and length > 0 else 1.0))
                assert normwise(p.detach().flatten(), q) < TOLERANCE[dtype], (t, p.shape)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@every_dtype
def test_around_adamw_it_is_lamb(weight_decay: float, dtype: torch.dtype, backend: str) -> None:
    options: dict[str, Any] = dict(eps=1e-6, weight_decay=weight_decay, backend=backend)
    ours = danlu.LayerAdaptation(danlu.AdamW(starts(dtype), **options))
    lamb = danlu.LAMB(starts(dtype), **options)
    for t, lr in enumerate(lrs()):
        for opt in (ours, lamb):
            give(opt, t)
            opt.param_groups[0]["lr"] = lr
            opt.step()
    for a, b in zip(everything(ours), everything(lamb), strict=True):
        assert normwise(a.detach(), b.detach()) < TOLERANCE[dtype] / 10


# what the parameter and its gradient are, so that the ratio is 1
EDGES: dict[str, tuple[Callable[[torch.Tensor], Any], Callable[[torch.Tensor], Any]]] = {
    "zero parameter": (lambda p: p.zero_(), lambda g: g),
    "zero step": (lambda p: p, lambda g: g.zero_()),
    "NaN in the gradient": (lambda p: p, lambda g: g.view(-1)[3:4].fill_(math.nan)),
    "NaN in the parameter": (lambda p: p.view(-1)[3:4].fill_(math.nan), lambda g: g),
}


@pytest.mark.pairs
@every_rule
@pytest.mark.parametrize("edge", EDGES)
def test_the_ratio_is_one(edge: str, case: Case, backend: str) -> None:
    """And the step the inner optimizer's, to the bit; a NaN stays where it is."""
    change_p, change_g = EDGES[edge]
    hyper = dict(case.hyper, weight_decay=0.0) if edge == "zero step" else case.hyper
    results = []
    for adapted in (True, False):
        p = torch.nn.Parameter(10 * values((40, 5), 0, wild=False))
        with torch.no_grad():
            change_p(p)
        opt = Case(case.id, case.optimizer, hyper, adapted).make([p], backend=backend)
        for t in range(3):
            p.grad = values((40, 5), 1 + t, wild=False)
            change_g(p.grad)
            opt.step()
            if "zero" in edge and not edge.endswith("step"):
                break  # after its first step it is no longer zero
        assert {row.backend for row in opt.backend_report()} == {backend}
        results.append(copies(opt))
    ours, theirs = results
    assert int(ours[0].isnan().sum()) == (1 if "NaN" in edge else 0)
    assert all_same(ours, theirs)


@every_rule
@pytest.mark.parametrize("on_device", [False, True], ids=["host", "device"])
def test_with_lr_zero_nothing_moves(case: Case, on_device: bool, backend: str) -> None:
    lr = torch.zeros(()) if on_device else 0.0
    opt = LAYERED[case.id].make(starts(), lr=lr, capturable=on_device, backend=backend)
    before = [p.detach().clone() for p in parameters(opt)]
    train(opt, range(3))
    assert all_same(parameters(opt), before)
    assert all(x.isfinite().all() for x in everything(opt))


@every_rule
def test_the_step_is_relative_to_the_parameter(case: Case, backend: str) -> None:
    for scale in (1e-3, 1.0, 1e3):
        start = scale * values((30, 40), 0, wild=False)
        p = torch.nn.Parameter(start.clone())
        opt = LAYERED[case.id].make([p], lr=0.01, backend=backend)
        for _ in range(case.hyper.get("accumulation_steps", 1)):
            p.grad = values((30, 40), 1, wild=False)
            opt.step()
        length = (p.detach() - start).norm().item()
        assert length == pytest.approx(0.01 * start.norm().item(), rel=1e-4)


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_norms_of_the_reference_are_float64(scale: float) -> None:
    """Of numbers whose squares fp32 does not have, which the kernels do not promise."""
    p = torch.nn.Parameter(torch.tensor([3.0, 4.0]) * scale)
    p.grad = torch.tensor([1.0, 0.0]) * scale
    danlu.LayerAdaptation(custom()([p], lr=0.25)).step()
    assert (p / scale).tolist() == pytest.approx([1.75, 4.0])


def adapted(**options: Any) -> danlu.LayerAdaptation:
    return danlu.LayerAdaptation(danlu.AdamW(some_params(), lr=0.1, **options))


def test_both_hold_the_same_groups_and_state(backend: str) -> None:
    opt = adapted(backend=backend)
    inner = opt.optimizer
    saved = copy.deepcopy(opt.state_dict())
    steps: list[Callable[[], Any]] = [
        lambda: None,
        lambda: opt.load_state_dict(copy.deepcopy(saved)),
        lambda: inner.load_state_dict(copy.deepcopy(saved)),
        lambda: inner.add_param_group({"params": some_params(4)[3:], "lr": 0.2}),
        lambda: opt.add_param_group({"params": some_params(5)[4:]}),
    ]
    for t, change in enumerate(steps):
        change()
        for name in ("param_groups", "state", "defaults"):
            assert getattr(opt, name) is getattr(inner, name)
        before = [p.detach().clone() for p in parameters(opt)]
        train(opt, [t])
        assert not any(same_bits(p.detach(), old) for p, old in zip(parameters(opt), before, strict=True))
        assert set(inner.state) == set(parameters(opt))
    assert len(opt.param_groups) == 3
    assert inner._plan is None  # it has not stepped


def test_an_optimizer_may_be_adapted_after_some_steps(backend: str) -> None:
    inner = danlu.AdamW(some_params(), backend=backend)
    train(inner, range(2))
    opt = danlu.LayerAdaptation(inner)
    train(opt, [2])
    assert {int(held["step"]) for held in opt.state.values()} == {3}


@pytest.mark.parametrize("saved_by", [danlu.AdamW, danlu.LAMB])
def test_checkpoints_of_adamw_and_lamb(saved_by: type[danlu.FusedOptimizer], backend: str) -> None:
    options: dict[str, Any] = dict(lr=0.01, eps=1e-6, backend=backend)
    old = saved_by(some_params(), **options)
    train(old, range(3))
    copied = [torch.nn.Parameter(p.detach().clone()) for p in parameters(old)]
    opt = danlu.LayerAdaptation(danlu.AdamW(copied, **options))
    opt.load_state_dict(copy.deepcopy(old.state_dict()))
    assert all_same(everything(opt), everything(old))
    back = danlu.AdamW([torch.nn.Parameter(p.detach().clone()) for p in copied], **options)
    back.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert all_same(everything(back), everything(old))
    if saved_by is danlu.LAMB:
        train(opt, range(3, 6))
        train(old, range(3, 6))
        for a, b in zip(everything(opt), everything(old), strict=True):
            assert normwise(a.detach(), b.detach()) < TOLERANCE[F32]


@pytest.mark.parametrize(
    ("name", "value"), [("trust_clip", True), ("bias_correction", False), ("always_adapt", False)]
)
def test_settings_of_lamb_that_would_be_lost(name: str, value: bool) -> None:
    lamb = danlu.LAMB(some_params(), **{name: value})  # type: ignore[arg-type]
    opt = adapted()
    with pytest.raises(ValueError, match=rf"LayerAdaptation has no {name}={value}"):
        opt.load_state_dict(lamb.state_dict())
    assert name not in opt.param_groups[0]


def test_a_checkpoint_in_the_terms_of_another_library() -> None:
    class Renaming(danlu.Lion):
        def translate(self, loaded: dict[str, Any]) -> dict[str, Any]:
            groups = [{**group, "lr": group["learning_rate"]} for group in loaded["param_groups"]]
            return {**loaded, "param_groups": groups}

    opt = danlu.LayerAdaptation(Renaming(some_params()))
    saved = copy.deepcopy(opt.state_dict())
    saved["param_groups"][0]["learning_rate"] = 0.125
    opt.load_state_dict(saved)
    assert opt.param_groups[0]["lr"] == 0.125


@pytest.mark.parametrize("held", ["outer", "inner"])
def test_a_scheduler_may_hold_either(held: str, backend: str) -> None:
    opt, by_hand = adapted(backend=backend), adapted(backend=backend)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(opt if held == "outer" else opt.optimizer, 0.5)
    for t in range(4):
        train(opt, [t])
        train(by_hand, [t])
        scheduler.step()  # warns if the optimizer it holds has not stepped
        by_hand.param_groups[0]["lr"] *= 0.5
    assert all_same(everything(opt), everything(by_hand))


def test_options_are_the_inner_ones() -> None:
    options: dict[str, Any] = dict(fused=True, state_dtype=torch.bfloat16, capturable=True, max_grad_norm=0.5)
    opt = adapted(maximize=True, **options)
    assert (opt.backend, opt.capturable, opt.counters_on_device) == ("auto", True, True)
    assert opt._step_supports_amp_scaling
    assert not hasattr(adapted(), "_step_supports_amp_scaling")
    train(opt, [0])
    assert {held["exp_avg"].dtype for held in opt.state.values()} == {torch.bfloat16}
    assert repr(opt).startswith("LayerAdaptation around AdamW (\nParameter Group 0\n")


def custom() -> type[danlu.FusedOptimizer]:
    """A sum of gradients, with a setting without effect that is named as one of LAMB."""

    def reference(p: torch.Tensor, g: torch.Tensor, m: torch.Tensor, *, lr: float, **others: Any) -> Any:
        m.add_(g)
        return m * lr

    return danlu.custom(
        "Sum",
        states=["exp_avg"],
        defaults=dict(lr=0.1, bias_correction=True),
        reference=reference,
        coefficients=lambda math, *, step, lr, bias_correction: dict(lr=lr),
    )


def test_a_rule_of_ones_own() -> None:
    p = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    p.grad = torch.tensor([2.0, 0.0])
    opt = danlu.LayerAdaptation(custom()([p], lr=0.1))
    opt.step()
    assert p.tolist() == pytest.approx([2.5, 4.0])
    (row,) = opt.backend_report()
    assert (row.backend, "no native rule 'layer_Sum#" in row.reason) == ("reference", True)


def test_a_setting_of_ones_own_that_lamb_has_too() -> None:
    opt = danlu.LayerAdaptation(custom()(some_params(), bias_correction=False))
    train(opt, range(2))
    other = danlu.LayerAdaptation(custom()(some_params()))
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert other.param_groups[0]["bias_correction"] is False


REFUSED: dict[str, Callable[[Any], Any]] = {
    "got torch.optim.adamw.AdamW": lambda params: torch.optim.AdamW(params),
    "got builtins.list": lambda params: list(params),
    "LAMB sums over tensors": lambda params: danlu.LAMB(params),
    "Adafactor sums over tensors": lambda params: danlu.Adafactor(params, lr=0.1),
    "Amos sums over tensors": lambda params: danlu.Amos(params, lr=0.1, eta=1.0, reduce_dims=()),
    "Tiger sums over tensors": lambda params: danlu.Tiger(params, scale_parameter=True, kind="matrix"),
    "Derived is a wrapper": lambda params: Derived(danlu.Lion(params)),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_cannot_be_adapted(why: str) -> None:
    with pytest.raises(TypeError, match=rf"^optimizer must be a danlu optimizer.*{why}$"):
        danlu.LayerAdaptation(REFUSED[why](some_params()))


def test_groups_that_turn_out_to_sum_later(backend: str) -> None:
    opt = danlu.LayerAdaptation(danlu.Tiger(some_params(), backend=backend))
    train(opt, [0])
    before = copies(opt)
    opt.param_groups[0].update(scale_parameter=True, kind="matrix")
    with pytest.raises(TypeError, match="Tiger sums over tensors"):
        train(opt, [1])
    assert all_same(everything(opt), before)
    opt.param_groups[0].update(scale_parameter=True, kind="vector")
    train(opt, [1])
    assert not all_same(everything(opt), before)


# what is each one's own, or done in torch's terms on groups and state that are shared
OWN = {
    "step",
    "add_param_group",
    "load_state_dict",
    "state_dict",
    "zero_grad",
    "backend_report",
    "make_state",
}


def test_whatever_a_plan_asks_is_asked_of_the_inner_optimizer() -> None:
    """A method or attribute that `FusedOptimizer` gains is passed on, or its own for a reason."""
    said = {name for base in (danlu.FusedOptimizer, UpdateRule) for name in vars(base) | base.__annotations__}
    public = {name for name in said if not name.startswith("_")}
    torchs = vars(torch.optim.SGD(some_params(), lr=0.1)).keys()
    held = vars(danlu.AdamW(some_params(), fused=True)).keys() - torchs - {"_plan", "_idle_plans"}
    held |= {"defaults", "param_groups", "state"}
    passed_on = {name for name, value in vars(Derived).items() if type(value) is type(vars(Derived)["rule"])}
    assert passed_on == (public | held) - OWN


def test_a_base_that_changes_nothing_is_the_inner_optimizer(backend: str) -> None:
    for case in CASES:
        opt = Derived(case.make(some_params(), backend=backend))
        alone = case.make(some_params(), backend=backend)
        train(opt, range(4))
        train(alone, range(4))
        assert all_same(everything(opt), everything(alone))
        assert opt.backend_report() == alone.backend_report()
