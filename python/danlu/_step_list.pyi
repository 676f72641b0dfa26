"""What the native lists have in common, for type checkers: csrc/host/step_list.h. There is no such module."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .spec import ParamSpec

class StepList:
    def add(self, spec: ParamSpec) -> None: ...
    def bind(self, state: dict[Any, Any]) -> None: ...
    def refresh(
        self,
        state: dict[Any, Any],
        listed: Sequence[tuple[int, int, int, int, int, int, int]] = ...,
        copy_gradient: Callable[[int], torch.Tensor | None] | None = ...,
    ) -> list[tuple[int, float, float]] | None: ...
    def active(self) -> int: ...
    def mask(self) -> list[bool]: ...
    def release(self) -> None: ...
