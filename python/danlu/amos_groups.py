"""Parameter groups for Amos: the scale that each parameter of a model is expected to have."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn

from . import checks
from .optimizers.amos import check_dims, reduced_dims

Dims = tuple[int, ...] | None


def amos_groups(
    model: nn.Module,
    *,
    eta: Mapping[str, float] | None = None,
    reduce_dims: Mapping[str, Dims] | None = None,
    mlp_outputs: Sequence[str] = (),
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

    (arXiv:2210.11693 and its code.) A norm is one of torch's, or for vectors a module with "Norm" in the name
    of its type. What an output of a convolution sums over counts as its inputs. A parameter that is tied is
    taken once, as an embedding if it is one anywhere.

    Args:
        model: whose parameters are taken, trained or not. Only their shapes are read.
        eta: what overrides the table, {pattern: value}. A pattern is a regular expression that is searched in
            a parameter's name, any of them if it is tied; the first that is found counts.
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
    for owners, p in owned_parameters(model):
        names = [name for name, _ in owners]
        defaults = [_default(name, module, p) for name, module in owners]
        found = next((default for default in defaults if default.rule == "embedding"), defaults[0])
        if found.rule == "kernel" and outputs.find(names, False):
            found = Default("mlp output", math.sqrt(2) * found.eta, found.reduce_dims)
        chosen_eta, chosen_dims = etas.find(names, found.eta), dims.find(names, found.reduce_dims)
        try:
            reduced_dims(chosen_dims, p.ndim)
        except ValueError as error:
            raise ValueError(f"{names[0]}: {error}") from None
        groups.add(p, Row(names[0], tuple(p.shape), found.rule, chosen_eta, chosen_dims))
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
        for group in self:
            if (group["eta"], group["reduce_dims"]) == (row.eta, row.reduce_dims):
                break
        else:
            group = dict(params=[], param_names=[], eta=row.eta, reduce_dims=row.reduce_dims)
            self.append(group)
        group["params"].append(p)
        group["param_names"].append(row.name)

    def __str__(self) -> str:
        def dims(row: Row) -> object:
            return "all" if row.reduce_dims is None else row.reduce_dims

        rows = [(row.name, row.shape, row.rule, f"{row.eta:.6g}", dims(row)) for row in self.rows]
        return table([("parameter", "shape", "rule", "eta", "reduce_dims"), *rows])


# What amos_strategy needs, too.


def owned_parameters(model: nn.Module) -> list[tuple[list[tuple[str, nn.Module]], nn.Parameter]]:
    """Each parameter once, with its names and the modules that own it."""
    found: dict[nn.Parameter, list[tuple[str, nn.Module]]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for name, p in module.named_parameters(path, recurse=False, remove_duplicate=False):
            found.setdefault(p, []).append((name, module))
    return [(owners, p) for p, owners in found.items()]


Value = TypeVar("Value")


class Patterns:
    """Overrides by regular expressions, and which of these were found in any name."""

    def __init__(self, option: str, values: Mapping[str, Any]) -> None:
        self._option = option
        self._values = dict(values)
        self._found: set[str] = set()

    def find(self, names: Iterable[str], default: Value) -> Value:
        """The value of the first pattern that is found in one of the names."""
        matching = [pattern for pattern in self._values if any(re.search(pattern, name) for name in names)]
        self._found.update(matching)
        return self._values[matching[0]] if matching else default

    def check(self) -> None:
        for pattern in self._values:
            if pattern not in self._found:
                raise ValueError(f"{self._option}: the pattern {pattern!r} is found in no parameter's name")


def table(rows: Iterable[Sequence[object]]) -> str:
    """Rows with their columns aligned."""
    texts = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in texts)


# The table of the docstring.


@dataclass(frozen=True)
class Default:
    """What a parameter gets without overrides."""

    rule: str
    eta: float
    reduce_dims: Dims


NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)
EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
KERNELS = (nn.Linear, nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase)


def _default(name: str, module: nn.Module, p: nn.Parameter) -> Default:
    shape = tuple(p.shape)
    if "bias" in name.rpartition(".")[2]:
        return Default("bias", 0.5, None)
    if isinstance(module, NORMS) or ("Norm" in type(module).__name__ and p.ndim < 2):
        return Default("norm gain", 1.0, None)
    if isinstance(module, EMBEDDINGS):
        return Default("embedding", math.sqrt(2 / max(1, shape[1])), (1,))
    if isinstance(module, KERNELS) and p.ndim == 2:
        return Default("kernel", math.sqrt(1 / max(1, shape[1])), (1,))
    if isinstance(module, nn.modules.conv._ConvNd):
        output = 1 if module.transposed else 0
        others = tuple(d for d in range(p.ndim) if d != output)
        # a transposed one has the inputs of all its groups along one dimension
        inputs = math.prod(shape[d] for d in others) // (module.groups if module.transposed else 1)
        return Default("kernel", math.sqrt(1 / max(1, inputs)), others)
    if p.ndim >= 2:
        return Default("unknown", math.sqrt(1 / max(1, shape[-1])), None)
    return Default("unknown", 0.5, None)
