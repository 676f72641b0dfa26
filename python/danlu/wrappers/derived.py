"""The base of optimizers that are built around another one and step in its place."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from ..locking import one_at_a_time
from ..optimizer import FusedOptimizer
from .order import Nested


class Inner:
    """What the inner optimizer has or does, under the same name."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, derived: Derived | None, owner: type) -> Any:
        return self if derived is None else getattr(derived._inner, self._name)

    def __set__(self, derived: Derived, value: Any) -> None:
        setattr(derived._inner, self._name, value)


class Derived(Nested, FusedOptimizer):
    """A `FusedOptimizer` that steps in the place of another one, which it keeps as `optimizer`.

    Both have the same param_groups, state and defaults, also after a checkpoint was loaded into either, so
    that a scheduler or a tool may hold any of them; the inner optimizer never steps by itself. Plan and hooks
    are each one's own. A subclass overrides what it changes of the rule and asks `self._inner` for the
    rest.

    Raises:
        TypeError: `optimizer` is not one of danlu's, or one that has to be around this one.
    """

    rank = 0
    _inner: FusedOptimizer

    # what it holds
    defaults: Any = Inner()
    param_groups: Any = Inner()
    state: Any = Inner()
    backend: Any = Inner()
    capturable: Any = Inner()
    counters_on_device: Any = Inner()
    _state_dtype: Any = Inner()
    _max_grad_norm: Any = Inner()
    max_grad_norm: Any = Inner()
    _lock: Any = Inner()
    _step_supports_amp_scaling: Any = Inner()

    # what it says of its rule
    state_names: ClassVar[Any] = Inner()
    optional_states: ClassVar[Any] = Inner()
    also_loads: ClassVar[Any] = Inner()
    reduces: ClassVar[Any] = Inner()
    takes_gradients: ClassVar[Any] = Inner()
    outcome: ClassVar[Any] = Inner()
    check: ClassVar[Any] = Inner()
    coefficients: ClassVar[Any] = Inner()
    reference: ClassVar[Any] = Inner()
    reference_takes_shape: ClassVar[Any] = Inner()
    rule: Any = Inner()
    states: Any = Inner()
    matrix: Any = Inner()
    sums: Any = Inner()
    summed_dims: Any = Inner()
    variant: Any = Inner()
    structure: Any = Inner()
    accumulation_steps: Any = Inner()
    sparse_mode: Any = Inner()
    translate: Any = Inner()
    learning_rate: Any = Inner()
    hyper: Any = Inner()
    sign: Any = Inner()
    moves: Any = Inner()
    initial_state: Any = Inner()
    fold: Any = Inner()
    state_dtype: Any = Inner()
    state_format: Any = Inner()
    param_format: Any = Inner()
    counters: Any = Inner()
    counter_device: Any = Inner()

    def __init__(self, optimizer: FusedOptimizer) -> None:
        self.check_order(optimizer)
        self.__setstate__({"_inner": optimizer})  # as if unpickled: there are no groups to add

    @classmethod
    def check_order(cls, optimizer: Any) -> None:
        super().check_order(optimizer)
        if not isinstance(optimizer, FusedOptimizer):
            kind = f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"
            raise TypeError(f"optimizer must be a danlu optimizer, got {kind}")

    def __repr__(self) -> str:
        return f"{type(self).__name__} around {self._inner!r}"

    def __getstate__(self) -> dict[str, Any]:
        return {"_inner": self._inner}

    def __setstate__(self, loaded: dict[str, Any]) -> None:
        """Takes what `__getstate__` gave, or groups and state that `load_state_dict` has read."""
        if "_inner" in loaded:
            torch.optim.Optimizer.__setstate__(self, loaded)
            self.defaults.pop("differentiable", None)  # torch adds it
        else:
            self._inner.__setstate__(loaded)
        self._drop_plan()

    @one_at_a_time
    def _step(self) -> None:
        self._inner._opt_called = True  # type: ignore[attr-defined]  # schedulers built on it ask
        super()._step()
