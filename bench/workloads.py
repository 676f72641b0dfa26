"""The shapes of models whose steps are timed."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Workload:
    """The shapes of a model's parameters.

    by_columns: where matrices stand in `shapes` that tensor parallelism cuts along their columns. It cuts the
    others along their rows.
    """

    id: str
    title: str
    shapes: Sequence[tuple[int, ...]]
    by_columns: frozenset[int] = frozenset()

    @property
    def elements(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes)

    def single_elements(self) -> Workload:
        """As many tensors of one element: all that is left of a step is the host's work."""
        return Workload(f"{self.id}-host", self.title, [(1,)] * len(self.shapes))


def gpt2_small() -> Workload:
    width, blocks = 768, 12
    shapes: list[tuple[int, ...]] = [(50257, width), (1024, width)]
    for _ in range(blocks):
        shapes += [(width,), (width,)]  # norm
        shapes += [(width, 3 * width), (3 * width,), (width, width), (width,)]  # attention
        shapes += [(width,), (width,)]  # norm
        shapes += [(width, 4 * width), (4 * width,), (4 * width, width), (width,)]  # perceptron
    shapes += [(width,), (width,)]
    # weights are transposed: the first layers of attention and of the perceptron
    widening = frozenset(i for i, shape in enumerate(shapes) if len(shape) == 2 and shape[0] < shape[1])
    return Workload("gpt2-small", "GPT-2 small, 124.4 M parameters in 148 tensors", shapes, widening)


def llama_1b() -> Workload:
    """The output layer shares the embedding."""
    shapes = _llama(width=2048, layers=16, keys=8 * 64, hidden=8192)
    title = "Llama 3.2 1B, 1.236 G parameters in 146 tensors"
    return Workload("llama-3.2-1b", title, shapes, _llama_by_columns(16))


def llama_8b() -> Workload:
    shapes = [*_llama(width=4096, layers=32, keys=8 * 128, hidden=14336), (128256, 4096)]
    title = "Llama 3 8B, 8.030 G parameters in 291 tensors"
    return Workload("llama-3-8b", title, shapes, _llama_by_columns(32))


def llama_70b() -> Workload:
    shapes = [*_llama(width=8192, layers=80, keys=8 * 128, hidden=28672), (128256, 8192)]
    title = "Llama 3 70B, 70.55 G parameters in 723 tensors"
    return Workload("llama-3-70b", title, shapes, _llama_by_columns(80))


def llama_405b() -> Workload:
    shapes = [*_llama(width=16384, layers=126, keys=8 * 128, hidden=53248), (128256, 16384)]
    title = "Llama 3.1 405B, 405.9 G parameters in 1,137 tensors"
    return Workload("llama-3.1-405b", title, shapes, _llama_by_columns(126))


def _llama(width: int, layers: int, keys: int, hidden: int) -> list[tuple[int, ...]]:
    shapes: list[tuple[int, ...]] = [(128256, width)]
    for _ in range(layers):
        shapes += [(width, width), (keys, width), (keys, width), (width, width)]  # attention
        shapes += [(hidden, width), (hidden, width), (width, hidden)]  # gated perceptron
        shapes += [(width,), (width,)]  # norms
    return [*shapes, (width,)]


def _llama_by_columns(layers: int) -> frozenset[int]:
    """The last matrices of attention and of the perceptron."""
    return frozenset(1 + 9 * layer + i for layer in range(layers) for i in (3, 6))


def many_small() -> Workload:
    uniform = random.Random(1).uniform
    shapes = [(max(1, int(2 ** uniform(10, 14)) // 64), 64) for _ in range(5000)]
    return Workload("many-small", "27.7 M parameters in 5,000 small tensors", shapes)


def matrices() -> Workload:
    """Each of 2.4 MB: with its gradient it fits where the next pass finds it."""
    return Workload("matrices", "48 matrices of 768 x 768", [(768, 768)] * 48)


def llama_8b_list() -> Workload:
    """As many tensors as Llama 3 8B has, small ones: the host's work is that of the real model."""
    return Workload("llama-3-8b-list", "291 small tensors, as many as Llama 3 8B has", [(64, 16)] * 291)
