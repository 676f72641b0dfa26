"""Parameter groups for Amos: the scale that each parameter of a model is expected to have."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from . import checks
from .model_parameters import CONVOLUTIONS, Pattern, Patterns, add_to_group, kind, owned_parameters, table
from .optimizers.amos import check_dims, reduced_dims
from .sharding import refuse_lost_shape

Dims = tuple[int, ...] | None


def amos_groups(
    model: nn.Module,
    *,
    eta: Mapping[Pattern, float] | None = None,
    reduce_dims: Mapping[Pattern, Dims] | None = None,
    mlp_outputs: Sequence[Pattern] = (),
) -> AmosGroups:
    """Parameter groups with the eta and reduce_dims that Amos's authors give each kind of parameter.

        rule         parameters                                       eta                reduce_dims
        bias         with "bias" in their name                        0.5                all
        norm gain    others of norms                                  1                  all
        embedding    of Embedding and EmbeddingBag (rows, hidden)     sqrt(2 / hidden)   rows keep theirs
        kernel       of Linear, attention, recurrent layers           sqrt(1 / inputs)   outputs keep theirs
                     and convolutions
        mlp output   the same, where `mlp_outputs` says so            sqrt(2 / inputs)   outputs keep theirs
        unknown      all others, with 2 or more dimensions            sqrt(1 / last)     all
                     and with fewer                                   0.5                all

    (arXiv:2210.11693 and its code.) A norm is one of torch's, or for vectors, of which all sizes but one are
    1, a module with "Norm" in the name of its type. What an output of a convolution sums over counts as its
    inputs. A parameter that is tied is taken once, as an embedding if it is one anywhere.

    Args:
        model: whose parameters are taken, trained or not. Only their shapes are read.
        eta: what overrides the table, {pattern: value}. A pattern is a regular expression that is searched in
            a parameter's name, any of them if it is tied, or a type of modules that it is in; the first that
            is found counts.
        reduce_dims: likewise, as `danlu.Amos` takes it: None for all dimensions, () for none.
        mlp_outputs: patterns of the kernels that are the second of an MLP, which no type tells.

    Returns:
        A list of groups, one for each setting, with `params`, `param_names`, `eta` and `reduce_dims`; as
        text, a table with a row for each parameter.

    Raises:
        ValueError: a pattern is found nowhere, a value is out of its range, or a parameter does not have a
            dimension.

    >>> model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.ReLU(), torch.nn.Linear(64, 2))
    >>> groups = danlu.amos_groups(model, mlp_outputs=["^2.weight"])
    >>> print(groups)
    parameter  shape     rule        eta       reduce_dims
    0.weight   (64, 16)  kernel      0.25      (1,)
    0.bias     (64,)     bias        0.5       all
    2.weight   (2, 64)   mlp output  0.176777  (1,)
    2.bias     (2,)      bias        0.5       all
    >>> optimizer = danlu.Amos(groups, lr=0.01)
    """
    if isinstance(mlp_outputs, str):  # whose letters would be patterns
        raise ValueError(f"mlp_outputs must be a sequence of patterns, got {mlp_outputs!r}")
    etas, dims = Patterns("eta", eta or {}), Patterns("reduce_dims", reduce_dims or {})
    outputs = Patterns("mlp_outputs", dict.fromkeys(mlp_outputs, True))
    for pattern, value in (eta or {}).items():
        checks.at_least_zero(f"eta[{pattern!r}]", value)
    for pattern, reduced in (reduce_dims or {}).items():
        check_dims(f"reduce_dims[{pattern!r}]", reduced)
    groups = AmosGroups()
    for owned in owned_parameters(model):
        p, name = owned.p, owned.names[0]
        refuse_lost_shape(name, p, "Amos needs its shape")
        defaults = [_default(name, module, p) for name, module in owned.owners]
        found = next((default for default in defaults if default.rule == "embedding"), defaults[0])
        if found.rule == "kernel" and outputs.find(owned, False):
            found = Default("mlp output", math.sqrt(2) * found.eta, found.reduce_dims)
        chosen_eta, chosen_dims = etas.find(owned, found.eta), dims.find(owned, found.reduce_dims)
        try:
            reduced_dims(chosen_dims, p.ndim)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        groups.add(p, Row(name, tuple(p.shape), found.rule, chosen_eta, chosen_dims))
    for patterns in (etas, dims, outputs):
        patterns.check()
    return groups


@dataclass(frozen=True)
class Row:
    """The setting of one parameter; `rule` is what it is without overrides."""

    name: str
    shape: tuple[int, ...]
    rule: str
    eta: float
    reduce_dims: Dims


class AmosGroups(list[dict[str, Any]]):
    """Parameter groups; as text, a table with a row for each parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[Row] = []

    def add(self, p: nn.Parameter, row: Row) -> None:
        """Puts the parameter with those of equal settings."""
        self.rows.append(row)
        add_to_group(self, p, row.name, eta=row.eta, reduce_dims=row.reduce_dims)

    def __str__(self) -> str:
        def dims(row: Row) -> object:
            return "all" if row.reduce_dims is None else row.reduce_dims

        rows = [(row.name, row.shape, row.rule, f"{row.eta:.6g}", dims(row)) for row in self.rows]
        return table([("parameter", "shape", "rule", "eta", "reduce_dims"), *rows])


# The table of the docstring.


@dataclass(frozen=True)
class Default:
    """What a parameter gets without overrides."""

    rule: str
    eta: float
    reduce_dims: Dims


def _default(name: str, module: nn.Module, p: nn.Parameter) -> Default:
    rule, shape = kind(name, module, p), tuple(p.shape)
    if rule == "bias":
        return Default(rule, 0.5, None)
    if rule == "norm gain":
        return Default(rule, 1.0, None)
    if rule == "embedding":
        return Default(rule, math.sqrt(2 / max(1, shape[1])), (1,))
    if isinstance(module, CONVOLUTIONS) and rule == "kernel":
        output = 1 if module.transposed else 0
        others = tuple(d for d in range(p.ndim) if d != output)
        # a transposed one has the inputs of all its groups along one dimension
        inputs = math.prod(shape[d] for d in others) // (module.groups if module.transposed else 1)
        return Default(rule, math.sqrt(1 / max(1, inputs)), others)
    if rule == "kernel":
        return Default(rule, math.sqrt(1 / max(1, shape[1])), (1,))
    if p.ndim >= 2:
        return Default(rule, math.sqrt(1 / max(1, shape[-1])), None)
    return Default(rule, 0.5, None)
