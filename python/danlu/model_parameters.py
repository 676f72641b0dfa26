"""A model's parameters: who owns them, of which kind they are, and settings by patterns of their names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypeVar

from torch import nn


@dataclass
class OwnedParameter:
    """A parameter with each of its names and the module that owns it there, and all modules that it is in."""

    p: nn.Parameter
    owners: list[tuple[str, nn.Module]] = field(default_factory=list)
    modules: list[nn.Module] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.owners]


def owned_parameters(model: nn.Module) -> list[OwnedParameter]:
    """Each parameter once, in the order of `model.parameters()`."""
    found: dict[nn.Parameter, OwnedParameter] = {}
    around: dict[str, list[nn.Module]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        around[path] = [*around.get(path.rpartition(".")[0], []), module]
        for name, p in module.named_parameters(path, recurse=False, remove_duplicate=False):
            owned = found.setdefault(p, OwnedParameter(p))
            owned.owners.append((name, module))
            owned.modules.extend(around[path])
    return list(found.values())


def add_to_group(groups: list[dict[str, Any]], p: nn.Parameter, name: str, **settings: Any) -> int:
    """Puts the parameter with those of equal settings, or into a new group; which one it was."""
    found = [{key: group[key] for key in group if key not in ("params", "param_names")} for group in groups]
    if settings not in found:
        found.append(settings)
        groups.append(dict(params=[], param_names=[], **settings))
    index = found.index(settings)
    groups[index]["params"].append(p)
    groups[index]["param_names"].append(name)
    return index


Pattern: TypeAlias = str | type[nn.Module]
Value = TypeVar("Value")


class Patterns:
    """Settings by patterns, and which of these were found anywhere.

    A pattern is a regular expression that is searched in a parameter's names, or a type of the modules that
    the parameter is in.
    """

    def __init__(self, option: str, values: Mapping[Any, Any]) -> None:
        self._option = option
        self._values = dict(values)
        self._found: set[Pattern] = set()
        for pattern in self._values:
            if isinstance(pattern, type) and issubclass(pattern, nn.Module):
                continue
            try:
                re.compile(pattern)
            except (re.error, TypeError):
                raise ValueError(
                    f"{option}: {pattern!r} is neither a regular expression nor a type of modules"
                ) from None

    def matching(self, owned: OwnedParameter) -> dict[Pattern, Any]:
        """The patterns that are found, with their values."""
        matching = {pattern: value for pattern, value in self._values.items() if _matches(pattern, owned)}
        self._found.update(matching)
        return matching

    def find(self, owned: OwnedParameter, default: Value) -> Value:
        """The value of the first pattern that is found."""
        return next(iter(self.matching(owned).values()), default)

    def check(self) -> None:
        for pattern in self._values:
            if pattern in self._found:
                continue
            where = "in no parameter's modules" if isinstance(pattern, type) else "in no parameter's name"
            raise ValueError(f"{self._option}: the pattern {text(pattern)} is found {where}")


def text(pattern: Any) -> str:
    """A pattern as it is written."""
    return pattern.__name__ if isinstance(pattern, type) else repr(pattern)


def _matches(pattern: Pattern, owned: OwnedParameter) -> bool:
    if isinstance(pattern, type):
        return any(isinstance(module, pattern) for module in owned.modules)
    return any(re.search(pattern, name) for name in owned.names)


def table(rows: Iterable[Sequence[object]]) -> str:
    """Rows with their columns aligned."""
    texts = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in texts)


NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)
EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
KERNELS = (nn.Linear, nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase)
CONVOLUTIONS = nn.modules.conv._ConvNd


def kind(name: str, module: nn.Module, p: nn.Parameter) -> str:
    """What a parameter is in the module that owns it: bias, norm gain, embedding, kernel or unknown."""
    if "bias" in name.rpartition(".")[2]:
        return "bias"
    vector = p.numel() == max(p.shape, default=1)  # as (channels, 1, 1) is, too
    if isinstance(module, NORMS) or ("Norm" in type(module).__name__ and vector):
        return "norm gain"
    if isinstance(module, EMBEDDINGS):
        return "embedding"
    if isinstance(module, CONVOLUTIONS) or (isinstance(module, KERNELS) and p.ndim == 2):
        return "kernel"
    return "unknown"
