"""What docs/schedules.md says of OneCycleLR and CyclicLR in their default settings is what they do."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import CyclicLR, LRScheduler, OneCycleLR

import danlu
from danlu.optimizers.adafactor_presets import PRESETS
from training import parameters, some_params, train

TEXT = (Path(__file__).resolve().parent.parent / "docs" / "schedules.md").read_text()
SCHEDULERS: dict[str, Callable[..., LRScheduler]] = {
    "one cycle": lambda opt, **options: OneCycleLR(opt, 0.1, total_steps=6, **options),
    "cyclic": lambda opt, **options: CyclicLR(opt, 1e-3, 0.1, step_size_up=2, **options),
}


def custom(**defaults: Any) -> Callable[..., danlu.FusedOptimizer]:
    def reference(p: torch.Tensor, g: torch.Tensor, m: torch.Tensor, **hyper: Any) -> torch.Tensor:
        return g * hyper["lr"]

    names = ", ".join(("lr", *defaults))
    coefficients = eval(f"lambda math, *, step, {names}: dict(lr=lr)")
    return danlu.custom(
        "Own", states=["m"], defaults=dict(lr=0.1, **defaults), reference=reference, coefficients=coefficients
    )


OPTIMIZERS: dict[str, list[Callable[..., torch.optim.Optimizer]]] = {
    **{f"`{name}`": [getattr(danlu, name)] for name in ("Lion", "Tiger", "LAMB")},
    "`Adam`, `AdamW`": [danlu.Adam, danlu.AdamW],
    "`AdaX`, `AdaXW`": [danlu.AdaX, danlu.AdaXW],
    "`Adafactor`, every preset": [
        lambda params, preset=preset, **options: danlu.Adafactor(params, preset=preset, lr=0.1, **options)
        for preset in PRESETS
    ]
    + [danlu.Adafactor, lambda params: danlu.Adafactor(params, beta1=0.9, lr=0.1)],
    "`Amos`": [
        lambda params, none=none: danlu.Amos(params, lr=0.1, **none)
        for none in ({}, {"momentum": None}, {"momentum": 0.0})
    ],
    "`Amos(momentum=0.9)`": [lambda params: danlu.Amos(params, lr=0.1, momentum=0.9)],
    "`danlu.custom`": [custom(betas=(0.9, 0.99)), custom(momentum=0.9), custom(beta=0.9)],
}
# what the table says, by the row's first cell
ROWS = dict(re.findall(r"^\| (`.+?) \| (.+?) \|$", TEXT, flags=re.MULTILINE))


def cycled(said: str) -> str | None:
    """The key of the group, if any."""
    if said.startswith("nothing"):
        assert "cycle_momentum=False" in said
        return None
    return "betas" if said.startswith("`betas[0]`") else "momentum"


def rows() -> Iterator[tuple[Callable[..., torch.optim.Optimizer], str | None]]:
    for name, makers in OPTIMIZERS.items():
        if name != "`danlu.custom`":
            yield from ((make, cycled(ROWS[name])) for make in makers)
    yield from zip(OPTIMIZERS["`danlu.custom`"], ("betas", "momentum", None), strict=True)


WRAPPERS: list[Callable[[Any], Any]] = [
    lambda opt: opt,
    danlu.Lookahead,
    danlu.EMA,
    lambda opt: danlu.GradientAccumulation(opt, 1),
]
OF_ELEMENTS: list[Callable[[Any], Any]] = [
    danlu.Lazy,
    danlu.LayerAdaptation,
    lambda opt: danlu.Lookahead(danlu.Lazy(danlu.LayerAdaptation(opt), "params")),
]


def wrapped_rows() -> Iterator[tuple[Any, str | None, Any]]:
    for make, key in rows():
        element_wise = not getattr(make(some_params(1)), "reduces", False)
        for around in WRAPPERS + OF_ELEMENTS * element_wise:
            yield make, key, around


def test_the_table_has_every_optimizer() -> None:
    classes = {
        thing
        for thing in vars(danlu).values()
        if isinstance(thing, type) and issubclass(thing, danlu.FusedOptimizer)
    }
    own = {cls.__name__ for cls in classes if "optimizers" in cls.__module__}
    assert {name for key in ROWS for name in re.findall(r"`(\w+)`", key)} == own
    assert ROWS.keys() == OPTIMIZERS.keys()
    wrappers = {
        name for name in danlu.__all__ if getattr(danlu, name).__module__.startswith("danlu.wrappers")
    }
    assert all(f"`{name}`" in TEXT for name in wrappers)


@pytest.mark.filterwarnings("ignore:a scheduler has written the lr")
@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize(("make", "key", "around"), list(wrapped_rows()))
def test_the_default_settings(name: str, make: Any, key: str | None, around: Any) -> None:
    one, *others = some_params(3)
    opt = around(make([{"params": [one]}, {"params": others}]))
    if key is None:
        before = [dict(group) for group in opt.param_groups]
        with pytest.raises(
            ValueError, match="optimizer must support momentum or beta1 with `cycle_momentum`"
        ):
            SCHEDULERS[name](opt)
        assert all(
            group[setting] == value
            for group, old in zip(opt.param_groups, before, strict=True)
            for setting, value in old.items()
            if setting not in ("params", "lr", "initial_lr")
        )
        train(opt, [0])
        assert all(not group.get("momentum") for group in opt.param_groups)
        return
    rest = opt.defaults[key][1:] if key == "betas" else None
    scheduler = SCHEDULERS[name](opt)
    seen = set()
    for t in range(4):
        train(opt, [t])
        values = {group[key][0] if key == "betas" else group[key] for group in opt.param_groups}
        assert len(values) == 1
        seen |= values
        assert rest is None or all(group[key][1:] == rest for group in opt.param_groups)
        scheduler.step()
    assert len(seen) > 2
    assert all(p.isfinite().all() for p in parameters(opt))


@pytest.mark.filterwarnings("ignore:a scheduler has written the lr")
@pytest.mark.parametrize("name", SCHEDULERS)
def test_without_cycled_momentum_every_optimizer_takes_them(name: str) -> None:
    for make, _ in rows():
        opt = make(some_params(2))
        scheduler = SCHEDULERS[name](opt, cycle_momentum=False)
        for t in range(3):
            train(opt, [t])
            scheduler.step()
        assert all(not group.get("momentum") for group in opt.param_groups) or opt.defaults.get("momentum")


def test_the_momentum_that_amos_cycles_is_the_one_it_uses() -> None:
    opts = [danlu.Amos(some_params(2), lr=0.1, momentum=m) for m in (0.9, 0.5)]
    for opt in opts:
        scheduler = CyclicLR(opt, 0.1, 0.1, base_momentum=0.5, max_momentum=0.5)
        for t in range(3):
            train(opt, [t])
            scheduler.step()
    for p, q in zip(*map(parameters, opts), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("momentum", [None, 0.0, 0.9])
def test_a_group_of_amos_may_have_a_momentum(momentum: float | None) -> None:
    one, two, three = some_params(3)
    opt = danlu.Amos([{"params": [one]}, {"params": [two], "momentum": 0.5}], lr=0.1, momentum=momentum)
    for bad in (1.0, "x"):
        with pytest.raises(ValueError, match="momentum must be"):
            opt.add_param_group({"params": [three], "momentum": bad})
    opt.add_param_group({"params": [three], "momentum": None})
    train(opt, [0])
    assert ["exp_avg" in opt.state[p] for p in (one, two, three)] == [bool(momentum), True, False]
    again = danlu.Amos([{"params": [p.detach().clone().requires_grad_()]} for p in (one, two, three)], lr=0.1)
    again.load_state_dict(copy.deepcopy(opt.state_dict()))
    train(opt, [1])
    train(again, [1])
    for p, q in zip(parameters(opt), parameters(again), strict=True):
        assert torch.equal(p, q)


def test_a_state_of_amos_without_the_key_has_no_momentum() -> None:
    opt = danlu.Amos(some_params(2), lr=0.1)
    train(opt, [0])
    saved = opt.state_dict()
    del saved["param_groups"][0]["momentum"]
    opt.load_state_dict(saved)
    train(opt, [1])
    assert all("exp_avg" not in held for held in opt.state.values())
