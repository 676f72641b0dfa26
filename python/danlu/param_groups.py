"""Parameter groups for any optimizer: decay, factors of lr and lazy parameters, by patterns."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from . import checks
from .model_parameters import (
    OwnedParameter,
    Pattern,
    Patterns,
    add_to_group,
    kind,
    owned_parameters,
    table,
    text,
)
from .sharding import refuse_lost_shape


def param_groups(
    model: nn.Module,
    weight_decay: float | None = None,
    *,
    no_decay: Collection[Pattern] = (),
    lr_scale: Mapping[Pattern, float] | None = None,
    lazy: Collection[Pattern] = (),
    lr: float | None = None,
) -> ParamGroups:
    """Parameter groups of a model: what gets no decay, which lr, what is lazy.

    Biases (with "bias" in their own name) and gains of norms get no decay: of torch's norms, and vectors, of
    which all sizes but one are 1, in modules with "Norm" in the name of their type. All others get one unless
    `no_decay` says otherwise, as `no_decay=[torch.nn.Embedding]` does for embeddings.

    A pattern is a regular expression that is searched in a parameter's name, or a type of modules: then it
    means the parameters in them, however deep. A parameter that is tied is taken once and found by any of its
    names and modules. Frozen ones (`requires_grad` False) are left out.

    Args:
        model: whose parameters are taken. Only their shapes are read.
        weight_decay: of the groups that get one, as the optimizer takes it; None leaves them with the
            optimizer's own. Optimizers without a weight_decay, `danlu.Amos` for one, do not read it.
        no_decay: patterns of parameters that get a weight_decay of 0, besides biases and gains of norms.
        lr_scale: {pattern: factor}; lr is multiplied by the factor.
        lazy: patterns of parameters whose groups are marked with `"lazy": True`, for `danlu.Lazy`. Others
            carry the mark without effect.
        lr: of the parameters without a factor; None leaves them with the optimizer's own, so that `lr_scale`
            has nothing to multiply and needs one.

    Returns:
        A list of groups for any optimizer of danlu or torch, one for each setting, in the order of the
        model's parameters, with `params`, `param_names` and those of `weight_decay`, `lr` and `lazy` that are
        set; as text, a table with a row for each parameter: its group, its settings and where they come from.
        An optimizer keeps the dicts themselves, as torch's do, so that another one needs groups of its own.

    Raises:
        ValueError: a pattern is found nowhere, factors of a parameter contradict each other, a value is out
            of its range, or lr is missing.

    >>> model = torch.nn.Sequential(torch.nn.Embedding(50, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 50))
    >>> groups = danlu.param_groups(model, 0.1, lr_scale={"^2": 10}, lazy=[torch.nn.Embedding], lr=1e-3)
    >>> print(groups)
    parameter  shape    group  weight_decay  lr_scale  lazy  rules
    0.weight   (50, 8)  0      0.1           1         yes   embedding, lazy Embedding
    1.weight   (8,)     1      0             1         no    norm gain
    1.bias     (8,)     1      0             1         no    bias
    2.weight   (50, 8)  2      0.1           10        no    kernel, lr_scale '^2'
    2.bias     (50,)    3      0             10        no    bias, lr_scale '^2'
    >>> optimizer = danlu.Lion(groups)
    >>> [(group["weight_decay"], group["lr"]) for group in optimizer.param_groups]
    [(0.1, 0.001), (0.0, 0.001), (0.1, 0.01), (0.0, 0.01)]
    """
    for name, value in dict(weight_decay=weight_decay, lr=lr).items():
        if value is not None:
            checks.at_least_zero(name, value)
    options = {
        "no_decay": Patterns("no_decay", dict.fromkeys(_collection("no_decay", no_decay))),
        "lr_scale": Patterns("lr_scale", _factors(lr_scale or {}, lr)),
        "lazy": Patterns("lazy", dict.fromkeys(_collection("lazy", lazy))),
    }
    groups = ParamGroups()
    for owned in owned_parameters(model):
        # in frozen ones as well, where a pattern is found but has no effect for now
        found = {option: patterns.matching(owned) for option, patterns in options.items()}
        if not owned.p.requires_grad:
            continue
        refuse_lost_shape(owned.names[0], owned.p, "biases and kernels alike", views=False)
        kinds = [kind(name, module, owned.p) for name, module in owned.owners]
        groups.add(owned, min(kinds, key=KINDS.index), found, weight_decay, lr)
    for patterns in options.values():
        patterns.check()
    return groups


@dataclass(frozen=True)
class Row:
    """The settings of one parameter, and the rules that they follow from.

    A weight_decay of None is the optimizer's own; `rules` are the parameter's kind and the patterns that were
    found in it.
    """

    name: str
    shape: tuple[int, ...]
    group: int
    weight_decay: float | None
    lr_scale: float
    lazy: bool
    rules: tuple[str, ...]


class ParamGroups(list[dict[str, Any]]):
    """Parameter groups; as text, a table with a row for each parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[Row] = []

    def add(
        self,
        owned: OwnedParameter,
        kind: str,
        found: Mapping[str, Mapping[Pattern, Any]],
        weight_decay: float | None,
        lr: float | None,
    ) -> None:
        """Puts the parameter with those of equal settings; `found` are its patterns by option."""
        name = owned.names[0]
        factor = _one_factor(name, found["lr_scale"])
        settings: dict[str, Any] = {}
        if kind in ("bias", "norm gain") or found["no_decay"]:
            settings["weight_decay"] = 0.0
        elif weight_decay is not None:
            settings["weight_decay"] = weight_decay
        if lr is not None:
            settings["lr"] = lr * factor
        if found["lazy"]:
            settings["lazy"] = True
        index = add_to_group(self, owned.p, name, **settings)
        decay, lazy = settings.get("weight_decay"), settings.get("lazy", False)
        rules = (kind, *(f"{option} {text(p)}" for option, patterns in found.items() for p in patterns))
        self.rows.append(Row(name, tuple(owned.p.shape), index, decay, factor, lazy, rules))

    def __str__(self) -> str:
        rows = [
            (
                row.name,
                row.shape,
                row.group,
                "optimizer's" if row.weight_decay is None else f"{row.weight_decay:.6g}",
                f"{row.lr_scale:.6g}",
                "yes" if row.lazy else "no",
                ", ".join(row.rules),
            )
            for row in self.rows
        ]
        return table([("parameter", "shape", "group", "weight_decay", "lr_scale", "lazy", "rules"), *rows])


# what a tied parameter is that is several of them: the first
KINDS = ("bias", "norm gain", "embedding", "kernel", "unknown")


def _one_factor(name: str, factors: Mapping[Pattern, float]) -> float:
    """What the patterns found agree on; 1 without any."""
    (first, factor), *others = factors.items() or [(None, 1.0)]
    for other, different in others:
        if different != factor:
            raise ValueError(
                f"{name}: lr_scale gives {factor} by {text(first)} and {different} by {text(other)}"
            )
    return factor


def _factors(lr_scale: Any, lr: float | None) -> dict[Pattern, float]:
    if not isinstance(lr_scale, Mapping):
        raise ValueError(f"lr_scale must be a dict {{pattern: factor}}, got {lr_scale!r}")
    if lr_scale and lr is None:
        raise ValueError("lr must be given with lr_scale, which multiplies it, got None")
    for pattern, factor in lr_scale.items():
        checks.at_least_zero(f"lr_scale[{text(pattern)}]", factor)
    return {pattern: float(factor) for pattern, factor in lr_scale.items()}


def _collection(option: str, patterns: Any) -> Collection[Pattern]:
    if isinstance(patterns, str) or not isinstance(
        patterns, Collection
    ):  # a string's letters would be patterns
        raise ValueError(f"{option} must be a list of patterns, got {patterns!r}")
    return patterns
