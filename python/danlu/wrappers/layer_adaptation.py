"""Layer adaptation."""

from __future__ import annotations

from collections.abc import Generator, Hashable
from typing import Any

import torch

from .. import scalar
from ..optimizer import FusedOptimizer
from ..partial_sums import PartialSums, Reducing, Statistic
from ..plan import refuse_flattened
from .derived import Derived


class LayerAdaptation(Derived):
    """Steps as large as the parameter allows, around any element-wise rule (as LAMB, arXiv:1904.00962).

        r = |p| / (|step| / lr)                            step: what the inner optimizer would subtract
        p = p - r * step

    The norms are over a parameter; r is 1 if either is 0. Decoupled weight decay is part of the step. Around
    `AdamW` with eps 1e-6 this is `LAMB`, and it loads LAMB's checkpoints.

    Args:
        optimizer: `Lion`, `Tiger` without `scale_parameter`, `Adam`, `AdamW`, `AdaX`, `AdaXW`, or one of a
            class made by `danlu.custom`. Both share settings, options, param_groups and state. A scheduler
            may take either; call `step()` on this one.

    State per parameter: the inner optimizer's, under the same names.

    Raises:
        TypeError: `optimizer` is not one of danlu's, sums over tensors itself, or is a wrapper.
        ValueError: a checkpoint of LAMB has settings that are missing here.

    >>> p = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    >>> p.grad = torch.tensor([1.0, 0.0])
    >>> danlu.LayerAdaptation(danlu.Lion([p], lr=0.25)).step()
    >>> p.tolist()
    [1.75, 4.0]
    """

    rank = 1
    reduces = True

    @property
    def also_loads(self) -> tuple[str, ...]:  # type: ignore[override]
        return tuple(_OF_LAMB)

    def __init__(self, optimizer: FusedOptimizer) -> None:
        super().__init__(optimizer)
        _check_element_wise(optimizer)
        refuse_flattened(self)

    def translate(self, loaded: dict[str, Any]) -> dict[str, Any]:
        for group in loaded["param_groups"]:
            for name, value in _OF_LAMB.items():
                if name not in self.defaults and group.get(name, value) != value:
                    raise ValueError(
                        f"LayerAdaptation has no {name}={group[name]}, with which this was saved"
                    )
        return self._inner.translate(loaded)

    def rule(self, group: dict[str, Any], shape: tuple[int, ...]) -> str:
        _check_element_wise(self._inner)  # a group may have been added or changed
        return f"layer_{self._inner.rule(group, shape)}"

    def sums(self, group: dict[str, Any], shape: tuple[int, ...]) -> tuple[tuple[Statistic, ...], ...]:
        return ((Statistic.of_all(shape),) * 2,)

    def fold(
        self,
        group: dict[str, Any],
        step: scalar.Scalar,
        micro_step: scalar.Scalar,
        device: torch.device | None = None,
        variant: Hashable = None,
    ) -> dict[str, Any]:
        folded = self._inner.fold(group, step, micro_step, device, variant)
        return {**folded, "group_lr": self.learning_rate(group, device)}

    def reference(
        self, p: torch.Tensor, g: torch.Tensor, *states: torch.Tensor, lr: float, **others: Any
    ) -> Reducing:
        step: Any = self._inner.reference(p, g, *states, lr=lr, **others)
        if isinstance(step, Generator):
            step = yield from step
        squares = [PartialSums.over(x.double().square()) for x in (p, step)]
        yield squares
        result: torch.Tensor = step * _ratio(squares[0], squares[1], lr)
        return result


# what LAMB does besides, where it does not
_OF_LAMB = dict(bias_correction=True, trust_clip=False, always_adapt=True)


def _ratio(p: PartialSums, step: PartialSums, lr: float) -> float:
    """Of squares. A NaN leaves it at 1: the element that has it shows by itself."""
    p_norm, step_norm = (squares.values.sqrt().item() for squares in (p, step))
    return p_norm * lr / step_norm if p_norm > 0 and step_norm > 0 else 1.0


def _check_element_wise(optimizer: FusedOptimizer) -> None:
    wrapped = isinstance(optimizer, Derived)
    if wrapped or optimizer.reduces:
        why = "is a wrapper" if wrapped else "sums over tensors"
        name = type(optimizer).__name__
        raise TypeError(f"optimizer must be a danlu optimizer with an element-wise rule, {name} {why}")
