"""The base class: torch's contract on one side, a rule, a plan and its backends on the other."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeAlias

import torch
from typing_extensions import TypedDict

from . import backends, callers, checkpoint, checks, formats, scale, sharded_step, state
from .describe import describe, left_alone
from .layout import Layout
from .locking import one_at_a_time
from .places import Places
from .plan import Plan, named_parameters, refuse_flattened
from .report import BackendReport
from .sharding import dtensor_type
from .update_rule import UpdateRule

Params: TypeAlias = Iterable[torch.Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, torch.Tensor]]

# a plan is kept as long as one of so many steps takes it: whoever steps group by group comes back to it, and
# parameters that are gone for good are let go
IDLE_STEPS = 64
# plans for one step: another thread may give gradients meanwhile
_TRIES = 10


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


class FusedOptimizer(UpdateRule, torch.optim.Optimizer):
    """A `torch.optim.Optimizer` whose step is one pass over memory. Subclasses give an `UpdateRule`.

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

    # plans are lists of addresses: what makes, runs or drops one, or changes what it lists, holds this
    _lock: AbstractContextManager[Any]
    _plan: Plan | None = None  # of the last step
    _idle_plans: tuple[Plan, ...] = ()  # of other lists of parameters, which steps take in turn
    _captured_plans: tuple[Plan, ...] = ()
    _steps: int = 0
    _layout: Layout | None = None  # of the last step that asked for one

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
            checks.one_of("state_dtype", state_dtype, [kept.arrays[0].dtype for kept in formats.TORCH])
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

    def counter_device(self, p: torch.Tensor) -> torch.device:
        """Where the counters of `p` are."""
        return p.device if self.counters_on_device else torch.device("cpu")

    @one_at_a_time
    def _step(self) -> None:
        if not self.state and callers.asks_for_state():
            self.make_state()
            return
        scaling = self._scaling(self.param_groups)
        layout = self._layout_of_now(scaling)
        if layout is None and self._skips(scaling):
            return
        self._steps += 1
        if self._idle_plans or self._plan is None or not self._plan.lists(self.param_groups):
            self._choose_plan()
        if layout is None:
            self._step_by(self, scaling)
        else:
            sharded_step.step(self, layout, scaling, lambda: self._begun(self))

    def _layout_of_now(self, scaling: scale.Scaling) -> Layout | None:
        """What other ranks are asked in this step; None if nothing is."""
        if dtensor_type() is None:
            return None
        if self._layout is None or not self._layout.fits(self):
            before, self._layout = self._layout, Layout(self, self._layout)
            if self._layout.members or (before is not None and before.members):
                self._drop_plan()  # which is made for a layout
        self._layout.ask_for_summands()
        return self._layout if self._layout.groups(scaling) else None

    def _scaling(self, groups: list[dict[str, Any]]) -> scale.Scaling:
        """Of a step of these groups, whose counters go where it can be read without waiting."""
        scaling = scale.Scaling.of(self, self.max_grad_norm)
        on_device = scaling.on_device or any(scale.is_on_device(group.get("lr")) for group in groups)
        if on_device and not self.counters_on_device:
            self.counters_on_device = True
            self._drop_plan()
        return scaling

    def _skips(self, scaling: scale.Scaling) -> bool:
        """Whether the host knows that a step has to change nothing."""
        return not self.counters_on_device and scaling.skips()

    def _step_by(self, keeper: _KeepsPlan, scaling: scale.Scaling) -> None:
        """One step by a plan, this optimizer's or a part's."""
        self._begun(keeper).step(self, scaling)

    def _begun(self, keeper: _KeepsPlan) -> Plan:
        """A plan that is current, with a step begun."""
        for _ in range(_TRIES):
            if keeper._plan is None:
                keeper._plan = keeper._new_plan()
            keeper._plan.last_step = self._steps
            if keeper._plan.begin(self):
                return keeper._plan
            self._drop(keeper._plan)  # should making the next one raise, the old one is no use
            keeper._plan = None
        raise RuntimeError(
            "danlu: parameters, gradients or states differ from the plan just made, each time anew: "
            "does another thread replace them?"
        )

    def _new_plan(self) -> Plan:
        return Plan(self, layout=self._layout)

    @functools.cached_property
    def _places(self) -> Places:
        """Where parts find their parameters."""
        return Places()

    def _choose_plan(self) -> None:
        """Takes the plan for the groups of now, if there is one, and drops those that were idle too long."""
        plans = self._idle_plans if self._plan is None else (self._plan, *self._idle_plans)
        self._plan = next((plan for plan in plans if plan.lists(self.param_groups)), None)
        idle = []
        for plan in plans:
            if plan is not self._plan:
                keep = plan.last_step >= self._steps - IDLE_STEPS
                # where a new plan is needed, parameters may have been replaced
                keep = keep and (self._plan is not None or plan.has_states(self))
                idle.append(plan) if keep else self._drop(plan)
        self._idle_plans = tuple(idle)

    def _drop_plan(self) -> None:
        """The next step makes a new one."""
        for plan in (self._plan, *self._idle_plans):
            self._drop(plan)
        self._plan, self._idle_plans = None, ()

    def _drop(self, plan: Plan | None) -> None:
        """A plan that a graph has captured stays for its replays."""
        if plan is not None and plan.captured:
            self._captured_plans += (plan,)

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
