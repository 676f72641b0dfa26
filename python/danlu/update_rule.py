"""What an optimizer says of its rule, and what follows from that for a group or a parameter."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Hashable
from typing import Any, ClassVar

import torch

from . import formats, scalar, scale, state
from .partial_sums import Reducing, Statistic, SummedDims
from .sharding import zeros


class UpdateRule:
    """The rule's half of `FusedOptimizer`, which calls it and never the other way round.

    A subclass gives `state_names`, `check`, `coefficients` and `reference`; a rule that does not take each
    element by itself, or has settings of its own, also what differs of the rest.
    """

    # in the order in which the rule takes them; `states` says which of them a parameter has
    state_names: ClassVar[tuple[str, ...]]
    # what of them a checkpoint may lack beside `micro_step`: starting it at 0 amid a training does no harm
    optional_states: ClassVar[tuple[str, ...]] = ()
    # hyper-parameters of classes whose checkpoints this one takes too, though it has not got them
    also_loads: ClassVar[tuple[str, ...]] = ()
    # whether the rule sums over tensors: then shards of a tensor need one another's sums
    reduces: ClassVar[bool] = False
    # whether `reference` is told the shape of the whole parameter, of which it may have a shard
    reference_takes_shape: ClassVar[bool] = False
    # whether a step needs a gradient; one that does not steps every parameter
    takes_gradients: ClassVar[bool] = True
    # what becomes of what `reference` returns: "subtracted" from the parameter, "assigned" to it, or "none"
    outcome: ClassVar[str] = "subtracted"

    # of the optimizer
    defaults: dict[str, Any]
    _state_dtype: torch.dtype | None

    _rule: ClassVar[str]
    _counter_names: ClassVar[tuple[str, ...]]
    _hyper_names: ClassVar[tuple[str, ...]]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "_rule" not in vars(cls) and ("coefficients" in vars(cls) or "reference" in vars(cls)):
            cls._rule = cls.__name__.lower()  # a subclass that only sets defaults keeps the rule
        if not callable(getattr(cls, "coefficients", None)):
            return  # a base class of some, or another optimizer has them
        names = inspect.signature(cls.coefficients).parameters
        cls._counter_names = tuple(name for name in names if name in state.COUNTERS)
        cls._hyper_names = tuple(name for name in names if name not in ("math", *state.COUNTERS))

    # What a subclass says; the first three are static methods.

    check: ClassVar[Callable[..., None]]
    """`check(**hyper)` raises ValueError for a hyper-parameter out of its range."""

    coefficients: ClassVar[Callable[..., dict[str, Any]]]
    """`coefficients(math, *, step, **hyper)`: what the rule takes, in its order, folded in float64; `math` is
    `danlu.scalar`.
    """

    reference: ClassVar[Callable[..., torch.Tensor | Reducing]]
    """`reference(p, g, *states, step, **hyper)`: updates the states in place, returns the amount to subtract.

    Plain torch in any float dtype; it leaves `p` and `g` alone and does not use `coefficients`. A rule that
    may reduce is a generator: it yields its `PartialSums`, all of a pass at once, before it uses them.
    """

    def rule(self, group: dict[str, Any], shape: tuple[int, ...]) -> str:
        """The name of the native rule for a parameter of that shape, as csrc/rules.h lists it.

        All rules of a group take the same coefficients.
        """
        return self._rule

    def states(self, group: dict[str, Any], shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Names of the states of a parameter of that shape, in the order the rule takes them, each with the
        dimensions that it is reduced over, where its size is 1.
        """
        return dict.fromkeys(self.state_names, ())

    def matrix(
        self, group: dict[str, Any], shape: tuple[int, ...], part: tuple[int, ...] | None = None
    ) -> tuple[int, int, int] | None:
        """How a native rule that reduces sees a parameter: (batch, rows, columns), in memory's order.

        part: the shape of the shard that is stepped; None: the whole. (1, 1, n) is a parameter whose order
        does not matter. None: no native rule can see this shape.
        """
        return 1, 1, math.prod(shape if part is None else part)

    def sums(self, group: dict[str, Any], shape: tuple[int, ...]) -> tuple[tuple[Statistic, ...], ...]:
        """What a step of a parameter of that shape sums over it, by the stops of `Executor.rounds`."""
        return ()

    def summed_dims(self, group: dict[str, Any], shape: tuple[int, ...]) -> SummedDims:
        """The dimensions that sums along rows are over, and those that sums along columns are over; rows and
        columns as `matrix` has them. Both empty for a rule that has no such sums.
        """
        return (), ()

    def variant(self, group: dict[str, Any], p: torch.Tensor) -> Hashable:
        """What of `p` the coefficients depend on, besides its group and step; None if on nothing."""
        return None

    def structure(self, group: dict[str, Any]) -> Hashable:
        """The settings of a group that a plan depends on: when they change, a new one is made."""
        return self.rule(group, ()), self.accumulation_steps(group)

    def accumulation_steps(self, group: dict[str, Any]) -> int:
        """Gradients that make one update; more than one gives every parameter a state `micro_step`."""
        return 1

    def sparse_mode(self, group: dict[str, Any]) -> str | None:
        """Which part of an update is left out for rows (along the first dimension) that take no part in a
        gradient: "rows" all of it, "params" that of the parameter. None: no row is told from another.
        """
        return None

    def translate(self, loaded: dict[str, Any]) -> dict[str, Any]:
        """A state_dict of another library in this class's terms; must not change what it is given."""
        return loaded

    # For plans and backends.

    def learning_rate(
        self, group: dict[str, Any], device: torch.device | None = None
    ) -> scalar.Scalar | None:
        """The group's lr as a float; with `device`, one that is not on the CPU as a float64 tensor there.

        None if the group has none, because the rule has a schedule of its own.
        """
        lr = group.get("lr")
        if lr is None:
            return None
        if device is not None and scale.is_on_device(lr):
            return torch.as_tensor(lr, dtype=torch.float64, device=device).reshape(())
        return float(lr)

    def hyper(
        self, group: dict[str, Any], device: torch.device | None = None, variant: Hashable = None
    ) -> dict[str, Any]:
        """The group's hyper-parameters as `coefficients` and `reference` take them."""
        values = {name: group[name] for name in self._hyper_names}
        return {**values, "lr": self.learning_rate(group, device)}

    def sign(self, group: dict[str, Any]) -> float:
        """What multiplies every gradient of the group, beside its scaling."""
        return -1.0 if group["maximize"] else 1.0

    def moves(self, group: dict[str, Any], device: torch.device | None = None) -> bool | torch.Tensor:
        """Whether a step may write the group's parameters; with `device`, an answer that may be there."""
        return self.learning_rate(group, device) != 0

    def initial_state(self, name: str, p: torch.Tensor, reduced: tuple[int, ...] = ()) -> torch.Tensor:
        """The state `name` of `p` before its first step, of size 1 in its reduced dimensions."""
        dtype = self.state_dtype(name, p)
        return zeros(p, reduced, dtype)

    def fold(
        self,
        group: dict[str, Any],
        step: scalar.Scalar,
        micro_step: scalar.Scalar,
        device: torch.device | None = None,
        variant: Hashable = None,
    ) -> dict[str, Any]:
        """The rule's coefficients, from numbers, or on a device from vectors with an element a parameter.

        A hyper-parameter that cannot be used raises as in the constructor.
        """
        try:
            hyper = self.hyper(group, device, variant)
            return self.coefficients(scalar, **self.counters(step, micro_step), **hyper)
        except (ArithmeticError, TypeError, ValueError):
            self._check_group(group)
            raise

    def state_dtype(self, name: str, p: torch.Tensor) -> torch.dtype:
        """The dtype of the state `name` of `p`, as far as it is kept in a tensor of some dtype."""
        if p.dtype == torch.float64:
            return torch.float64
        return self._state_dtype or torch.float32 if name == "exp_avg" else torch.float32

    def state_format(self, name: str, p: torch.Tensor) -> formats.Format:
        """How the state `name` of `p` is kept."""
        return formats.plain(self.state_dtype(name, p))

    def param_format(self, p: torch.Tensor) -> formats.Format:
        """How a parameter is kept; `p` is the first of its arrays, the others are in its state."""
        return formats.plain(p.dtype)

    def counters(self, step: scalar.Scalar, micro_step: scalar.Scalar) -> dict[str, scalar.Scalar]:
        """Those counters that `coefficients` and `reference` take."""
        values = {"step": step, "micro_step": micro_step}
        return {name: values[name] for name in self._counter_names}

    def _check_group(self, group: dict[str, Any]) -> None:
        merged = {name: group.get(name, default) for name, default in self.defaults.items()}
        merged.pop("maximize")
        self.check(**merged)
