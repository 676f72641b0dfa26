"""The base class: torch's contract on one side, a plan and its backends on the other."""

from __future__ import annotations

import functools
import inspect
import math
import threading
from collections.abc import Callable, Hashable, Iterable
from contextlib import AbstractContextManager
from typing import Any, ClassVar, Protocol, TypeAlias

import torch
from typing_extensions import TypedDict

from . import backends, callers, checkpoint, checks, scalar, scale, state
from .describe import describe, left_alone
from .locking import one_at_a_time
from .partial_sums import Reducing, SummedDims
from .places import Places
from .plan import Plan, named_parameters, refuse_flattened
from .report import BackendReport

Params: TypeAlias = Iterable[torch.Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, torch.Tensor]]

# a plan is kept as long as one of so many steps takes it: whoever steps group by group comes back to it, and
# parameters that are gone for good are let go
RESTING_STEPS = 64
# plans for one step: another thread may give gradients meanwhile
_TRIES = 10
STATE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class EngineOptions(TypedDict, total=False):
    """The keyword arguments that every danlu optimizer takes, see `FusedOptimizer`."""

    maximize: bool
    backend: str
    state_dtype: torch.dtype | None
    max_grad_norm: float | None
    fused: bool | None
    foreach: bool | None
    capturable: bool
    differentiable: bool


class FusedOptimizer(torch.optim.Optimizer):
    """A `torch.optim.Optimizer` whose step is one pass over memory. Subclasses give the rule.

    Keyword arguments of every subclass:
        maximize: move along the gradient instead of against it; may differ between parameter groups.
        backend: `"auto"` takes the fastest that can run each parameter; `"reference"` (plain torch), `"cpu"`,
            `"cuda"` or `"triton"` ask for one. `backend_report()` tells which parameter took which, and why.
        state_dtype: dtype of the first moment, one of float32 (the default), bfloat16, float16. Second
            moments are always float32; a float64 parameter has float64 state.
        max_grad_norm: scales all gradients by 1 / max(1, |g| / max_grad_norm), |g| being their norm over all
            groups. The gradients themselves are not written.
        fused: False asks for the reference, True for a native backend; True also lets a GradScaler leave its
            unscaling and its check for infinities to the step, as in torch.
        foreach: accepted, without effect: every step is multi-tensor.
        capturable: keep `step` on the parameter's device and compute coefficients there, as a captured CUDA
            graph needs; no effect on CPU tensors. An lr on a device, or a GradScaler's tensors there, do the
            same from the first step that sees them.
        differentiable: only False.

    Threads may share an optimizer: a step waits for another one's, but not for its closure, and what changes
    or reads groups and state waits for the step. Parameters that share memory are stepped in the order of
    their groups.

    lr may be a float or a tensor of one element and is read at every step. With lr == 0 no parameter changes,
    while state is made and moves.

    Raises:
        ValueError: an option is out of its range, or options contradict each other.
        RuntimeError: the backend asked for is not available here; the message says what is missing.
    """

    # in the order in which the rule takes them; `states` says which of them a parameter has
    state_names: ClassVar[tuple[str, ...]]
    # what of them a checkpoint may lack beside `micro_step`: starting it at 0 amid a training does no harm
    optional_states: ClassVar[tuple[str, ...]] = ()
    # hyper-parameters of classes whose checkpoints this one takes too, though it has not got them
    also_loads: ClassVar[tuple[str, ...]] = ()
    # whether the rule sums over tensors: then shards of a tensor cannot be stepped one by one
    reduces: ClassVar[bool] = False
    # whether a step needs a gradient; one that does not steps every parameter
    takes_gradients: ClassVar[bool] = True
    # what becomes of what `reference` returns: "subtracted" from the parameter, "assigned" to it, or "none"
    outcome: ClassVar[str] = "subtracted"

    # plans are lists of addresses: what makes, runs or drops one, or changes what it lists, holds this
    _lock: AbstractContextManager[Any]
    _plan: Plan | None = None  # of the last step
    _resting_plans: tuple[Plan, ...] = ()  # of other lists of parameters, which steps take in turn
    _captured_plans: tuple[Plan, ...] = ()
    _steps: int = 0

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

    def __init__(
        self,
        params: Params,
        defaults: dict[str, Any],
        *,
        maximize: bool = False,
        backend: str = "auto",
        state_dtype: torch.dtype | None = None,
        max_grad_norm: float | None = None,
        fused: bool | None = None,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
    ) -> None:
        if state_dtype is not None:
            checks.one_of("state_dtype", state_dtype, STATE_DTYPES)
        if max_grad_norm is not None:
            checks.at_least_zero("max_grad_norm", max_grad_norm)
            if max_grad_norm == 0:
                raise ValueError("max_grad_norm must be greater than 0, got 0; None turns it off")
        if differentiable:
            raise ValueError("differentiable must be False: a fused step is not recorded by autograd")
        self.backend = backends.resolve(backend, fused)
        self._state_dtype = state_dtype
        self._max_grad_norm = max_grad_norm
        self.capturable = capturable
        self.counters_on_device = capturable
        if fused:
            self._step_supports_amp_scaling = True
        self._lock = threading.RLock()
        super().__init__(params, dict(defaults, maximize=maximize))

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
        """Names and shapes of the states of a parameter of that shape, in the order the rule takes them."""
        return dict.fromkeys(self.state_names, shape)

    def matrix(self, group: dict[str, Any], shape: tuple[int, ...]) -> tuple[int, int, int] | None:
        """How a native rule that reduces sees a parameter: (batch, rows, columns), in memory's order.

        (1, 1, n) is a parameter whose order does not matter. None: no native rule can see this shape.
        """
        return 1, 1, math.prod(shape)

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

    # torch's contract.

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Makes one step for every parameter that has a gradient.

        A first step by which torch's distributed checkpoints ask for state makes that and counts nothing.

        Args:
            closure: re-evaluates the model and returns the loss, which is passed on.

        Raises:
            TypeError, ValueError: a tensor cannot be stepped; the message names its parameter. Nothing was
            changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._step()
        return loss

    @one_at_a_time
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group; it may come late and may override any hyper-parameter.

        Raises:
            ValueError: a hyper-parameter of the group is out of its range, or the rule or `max_grad_norm`
            needs whole parameters and FSDP1 or ZeRO stage 3 has cut one up. The optimizer is as before.
        """
        if isinstance(param_group, dict):
            self._check_group(param_group)
        first = len(self.param_groups)
        super().add_param_group(param_group)
        try:
            refuse_flattened(self, first)
        except ValueError:
            self.param_groups.pop()
            raise
        self._drop_plan()

    @one_at_a_time
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Sets gradients to None, or to zero."""
        super().zero_grad(set_to_none)

    @one_at_a_time
    def state_dict(self) -> dict[str, Any]:
        """As torch gives it."""
        return super().state_dict()

    @one_at_a_time
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state_dict of this class, or of the torch optimizer of the same name.

        Each state keeps the dtype that this optimizer gives it, where torch would cast it to the parameter's.
        As in torch, tensors that fit are taken without a copy. A parameter without any state starts anew.

        Raises:
            TypeError, ValueError: groups or hyper-parameters do not fit, or a state is missing or does not;
            the message names its parameter. The optimizer is as before.
        """
        # runs after the user's own hooks, which may replace the dict
        hook = self.register_load_state_dict_pre_hook(lambda _, loaded: self._guard_loaded(loaded))
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()

    def __getstate__(self) -> dict[str, Any]:
        settings = {name: self.__dict__[name] for name in _SETTINGS if name in self.__dict__}
        return {**super().__getstate__(), **settings}

    def __setstate__(self, loaded: dict[str, Any]) -> None:
        """Takes what `__getstate__` gave, or groups and state that torch's `load_state_dict` has assigned."""
        self.__dict__.setdefault("_lock", threading.RLock())
        unpickled = "defaults" in loaded
        if not unpickled:
            loaded = checkpoint.read(self, loaded)  # may raise, when nothing is changed yet
        super().__setstate__(loaded)
        self.defaults.pop("differentiable", None)  # torch adds it
        self._drop_plan()
        if unpickled:
            for group in self.param_groups:
                for name, default in self.defaults.items():
                    group.setdefault(name, default)
            state.as_counters(self)

    # For users and tools.

    @one_at_a_time
    def backend_report(self) -> BackendReport:
        """Which backend takes each parameter in the next step, and why; printable, and a list of rows.

        Parameters without a gradient are reported as if they had one of their own dtype, those that need
        none and could not be stepped as left alone (backend "none").
        """
        return BackendReport.of(self)

    @property
    def max_grad_norm(self) -> float | None:
        """As it was given; plans are made for it."""
        return self._max_grad_norm

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

    def initial_state(self, name: str, p: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        """The state `name` of `p` before its first step."""
        dtype = self.state_dtype(name, p)
        if shape == p.shape:
            return torch.zeros_like(p, dtype=dtype, requires_grad=False)
        return torch.zeros(shape, dtype=dtype, device=p.device)

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
        """The dtype of the state `name` of `p`."""
        if p.dtype == torch.float64:
            return torch.float64
        return self._state_dtype or torch.float32 if name == "exp_avg" else torch.float32

    def make_state(self) -> None:
        """Gives every parameter that a step may take the state that it does not have yet.

        Raises:
            TypeError, ValueError: a parameter cannot be stepped; nothing was made.
        """
        taken = []
        for index, name, p in named_parameters(self):
            takes_part = p.requires_grad or not self.takes_gradients
            if takes_part and left_alone(self, index, name, p) is None:
                describe(self, index, name, p)
                taken.append((p, self.param_groups[index]))
        for p, group in taken:
            state.ensure(self, p, group)

    def counters(self, step: scalar.Scalar, micro_step: scalar.Scalar) -> dict[str, scalar.Scalar]:
        """Those counters that `coefficients` and `reference` take."""
        values = {"step": step, "micro_step": micro_step}
        return {name: values[name] for name in self._counter_names}

    def counter_device(self, p: torch.Tensor) -> torch.device:
        """Where the counters of `p` are."""
        return p.device if self.counters_on_device else torch.device("cpu")

    @one_at_a_time
    def _step(self) -> None:
        if not self.state and callers.asks_for_state():
            self.make_state()
            return
        scaling = self._scaling(self.param_groups)
        if scaling is None:
            return
        self._steps += 1
        if self._resting_plans or self._plan is None or not self._plan.lists(self.param_groups):
            self._choose_plan()
        self._step_by(self, scaling)

    def _scaling(self, groups: list[dict[str, Any]]) -> scale.Scaling | None:
        """Of a step of these groups; None if it has to change nothing."""
        scaling = scale.Scaling.of(self, self.max_grad_norm)
        if not self.counters_on_device:
            if scaling.on_device or any(scale.is_on_device(group.get("lr")) for group in groups):
                self.counters_on_device = True
                self._drop_plan()
            elif scaling.skips():
                return None
        return scaling

    def _step_by(self, keeper: _KeepsPlan, scaling: scale.Scaling) -> None:
        """One step by a plan, this optimizer's or a part's."""
        for _ in range(_TRIES):
            if keeper._plan is None:
                keeper._plan = keeper._new_plan()
            keeper._plan.last_step = self._steps
            if keeper._plan.step(self, scaling):
                return
            self._drop(keeper._plan)  # should making the next one raise, the old one is no use
            keeper._plan = None
        raise RuntimeError("danlu: a parameter does not match the plan just made; please report this")

    def _new_plan(self) -> Plan:
        return Plan(self)

    @functools.cached_property
    def _places(self) -> Places:
        """Where parts find their parameters."""
        return Places()

    def _choose_plan(self) -> None:
        """Takes the plan for the groups of now, if one rests, and drops those that rest too long."""
        plans = self._resting_plans if self._plan is None else (self._plan, *self._resting_plans)
        self._plan = next((plan for plan in plans if plan.lists(self.param_groups)), None)
        resting = []
        for plan in plans:
            if plan is not self._plan:
                rests = plan.last_step >= self._steps - RESTING_STEPS
                # where a new plan is needed, parameters may have been replaced
                rests = rests and (self._plan is not None or plan.has_states(self))
                resting.append(plan) if rests else self._drop(plan)
        self._resting_plans = tuple(resting)

    def _drop_plan(self) -> None:
        """The next step makes a new one."""
        for plan in (self._plan, *self._resting_plans):
            self._drop(plan)
        self._plan, self._resting_plans = None, ()

    def _drop(self, plan: Plan | None) -> None:
        """A plan that a graph has captured stays for its replays."""
        if plan is not None and plan.captured:
            self._captured_plans += (plan,)

    def _check_group(self, group: dict[str, Any]) -> None:
        merged = {name: group.get(name, default) for name, default in self.defaults.items()}
        merged.pop("maximize")
        self.check(**merged)

    def _guard_loaded(self, loaded: dict[str, Any]) -> dict[str, Any]:
        loaded = self.translate(loaded)
        for group in loaded["param_groups"]:
            self._check_group(group)
        checkpoint.check_settings(self, loaded["param_groups"])
        return {**loaded, "state": checkpoint.carried(loaded["state"])}


class _KeepsPlan(Protocol):
    """What makes a plan and keeps it from step to step."""

    _plan: Plan | None

    def _new_plan(self) -> Plan: ...


# what deepcopy and pickling keep beside torch's own; plans are made anew
_SETTINGS = (
    "backend",
    "_state_dtype",
    "_max_grad_norm",
    "capturable",
    "counters_on_device",
    "_step_supports_amp_scaling",
)
