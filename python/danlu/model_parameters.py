"""A model's parameters: who owns them, of which kind they are, and settings by patterns of their names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from torch import nn


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


NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)
EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
KERNELS = (nn.Linear, nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase)
CONVOLUTIONS = nn.modules.conv._ConvNd


def kind(name: str, module: nn.Module, p: nn.Parameter) -> str:
    """What a parameter is in the module that owns it: bias, norm gain, embedding, kernel or unknown."""
    if "bias" in name.rpartition(".")[2]:
        return "bias"
    if isinstance(module, NORMS) or ("Norm" in type(module).__name__ and p.ndim < 2):
        return "norm gain"
    if isinstance(module, EMBEDDINGS):
        return "embedding"
    if isinstance(module, CONVOLUTIONS) or (isinstance(module, KERNELS) and p.ndim == 2):
        return "kernel"
    return "unknown"
