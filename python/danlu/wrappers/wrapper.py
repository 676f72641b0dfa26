"""The base class of optimizers that do something around the steps of another one."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch

from .. import callers, capture
from ..optimizer import FusedOptimizer
from ..report import BackendReport
from .evaluation import Evaluated
from .inner_state import Requested, UpdateMade
from .joint_state_dict import joined, taken_apart
from .parameter_pass import ParameterPass, innermost
from .state_view import StateView


class Wrapper(Evaluated, torch.optim.Optimizer):
    """Steps `optimizer`, and makes passes of its own over the same parameters.

    Parameter groups and defaults are the optimizer's own objects, so that schedulers and trainers may hold
    either; `state` shows what the wrapper keeps beside the optimizer's states. The state_dict has both: for
    each parameter the wrapper's states, and in each group what `marks` says.

    `eval()` puts the weights for evaluation in place, if this wrapper or one inside has such, and `train()`
    those for training back; a step between them raises RuntimeError. A state_dict taken between them has the
    weights for training, too: an optimizer that loads it goes on after `train()`. To load one of training
    between them ends the evaluation: the parameters stay as they are then. Steps, saving and loading of one
    optimizer by several threads happen one after the other.

    Args:
        optimizer: one of danlu's or of torch's, or a wrapper around one; schedulers may come before or after.

    Attributes:
        optimizer: the one that is wrapped.
        stepped: whether the last call of `step()` moved the parameters.
    """

    _shared: _Shared

    # the key in each group under which `position`, the place in a cycle, is kept
    position_key: ClassVar[str | None] = None

    def __init__(self, optimizer: torch.optim.Optimizer, own_pass: ParameterPass) -> None:
        # torch's own __init__ would make groups and state
        self.__setstate__({"_shared": _Shared(optimizer, own_pass)})
        self._begin_anew()

    @classmethod
    def check_order(cls, optimizer: Any) -> None:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
        super().check_order(optimizer)
        if isinstance(optimizer, torch.optim.LBFGS):
            raise TypeError(f"optimizer must step once a call: {cls.__name__} takes no LBFGS")
        if any(group.get("accumulation_steps", 1) != 1 for group in optimizer.param_groups):
            raise TypeError(f"accumulation_steps must be 1 for an optimizer inside {cls.__name__}")

    # What torch.optim.Optimizer keeps as attributes.

    @property
    def _inner(self) -> Any:
        return self._shared.optimizer

    @property
    def _pass(self) -> Any:
        return self._shared.own_pass

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        groups: list[dict[str, Any]] = self._inner.param_groups
        return groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        marks = self.marks()
        self._inner.param_groups = groups
        for group in groups:
            for key, value in marks.items():
                group.setdefault(key, value)

    @property
    def state(self) -> Any:
        own: Any = self._pass.state
        return StateView(self._inner.state, own, self._pass.shown_names(), self._pass.look_again)

    @state.setter
    def state(self, state: Mapping[Any, Any]) -> None:
        names = self._pass.shown_names()
        own: dict[Any, Any] = {}
        ours = any(isinstance(x, Mapping) and not names.keys().isdisjoint(x) for x in state.values())
        if ours or isinstance(state, StateView):
            inner: dict[Any, Any] = defaultdict(dict)
            StateView(inner, own, names).update(state)
            state = inner
        self._inner.state = state
        self._pass.replace_state(own)

    @property
    def defaults(self) -> dict[str, Any]:
        defaults: dict[str, Any] = self._inner.defaults
        return defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self._inner.defaults = defaults

    @property
    def stepped(self) -> bool:
        return self._shared.stepped

    @stepped.setter
    def stepped(self, stepped: bool) -> None:
        self._shared.stepped = stepped

    @property
    def position(self) -> int:
        """The place in the cycle, which the groups keep: each counts the steps that it takes part in."""
        key = self.position_key or ""
        return next((group[key] for group in self.param_groups if key in group), 0)

    @position.setter
    def position(self, position: int) -> None:
        if self.position_key is not None:
            for group in self.param_groups:
                group[self.position_key] = position

    def marks(self) -> dict[str, Any]:
        """What each group says of this wrapper, under keys that no optimizer has."""
        return {} if self.position_key is None else {self.position_key: self.position}

    def _mark_groups(self, *, anew: bool = False) -> None:
        """Of groups that came without this wrapper's keys; `anew`: in the place of what they have."""
        if anew:
            self.position = 0
        for group in self.param_groups:
            for key, value in self.marks().items():
                if anew or key not in group:
                    group[key] = value

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        with self._shared.lock:
            self._inner.add_param_group(param_group)
            self._mark_groups()

    # A step.

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One call a gradient, as for any optimizer; the closure's loss is passed on.

        Raises:
            RuntimeError: the class says when; weights for evaluation are in place. Nothing was changed.
            TypeError, ValueError: a tensor cannot be stepped; the message names its parameter.
        """
        shared = self._shared
        loss = None
        if closure is not None and _calls_once(innermost(self)):
            # not under the lock, as the optimizer alone would
            self.refuse_in_evaluation()
            with torch.enable_grad():
                loss, closure = closure(), None
        with shared.lock:
            if not shared.optimizer.state and callers.asks_for_state():
                self.make_state()
                return None
            self.refuse_in_evaluation()
            self._take_up_groups()
            self.stepped = False
            result = self._step(closure)
            return loss if closure is None else result

    def _step(self, closure: Callable[[], Any] | None) -> Any:
        raise NotImplementedError

    def step_inner(self, closure: Callable[[], Any] | None = None) -> Any:
        """Steps the optimizer inside, and counts its update if it was made, error or not."""
        if self._shared.requested is not None:
            self._shared.requested.drop()
            self._shared.requested = None
        update = UpdateMade(innermost(self))
        try:
            with update:
                return self._inner.step(closure) if closure is not None else self._inner.step()
        finally:
            if update.made:
                self.count_update()

    def count_update(self) -> None:
        """The optimizer inside has made its update."""
        self.stepped = True

    def refuse_capture(self) -> None:
        """Raises inside the capture of a CUDA graph."""
        if any(capture.is_capturing(p.device) for group in self.param_groups for p in group["params"][:1]):
            raise RuntimeError(
                f"{type(self).__name__}: a CUDA graph cannot count steps; capture the optimizer's"
            )

    def make_state(self) -> None:
        """Makes all state that steps would, the optimizer's and the wrapper's, and counts no step."""
        if isinstance(self._inner, Wrapper | FusedOptimizer):
            self._inner.make_state()
        else:
            self._shared.requested = Requested(self._inner)
        self._pass.start()

    def _take_up_groups(self) -> None:
        """Somebody gave the optimizer inside other groups, or loaded it past this wrapper."""
        marks = self.marks()
        marked = [marks.keys() <= group.keys() for group in self.param_groups]
        if marked and not any(marked):
            self._begin_anew()
        elif not all(marked):
            self._mark_groups()

    def _begin_anew(self) -> None:
        """Takes no notice of what a wrapper of this class has left in the optimizer's state and groups."""
        names = self._pass.shown_names().keys()
        for held in innermost(self).state.values():
            if isinstance(held, dict) and names & held.keys():
                for name in {*names, self.training_key} & held.keys():
                    del held[name]
        self._pass.replace_state({})
        self._mark_groups(anew=True)

    def zero_grad(self, set_to_none: bool = True) -> None:
        with self._shared.lock:
            self._inner.zero_grad(set_to_none)

    def backend_report(self) -> BackendReport:
        """Which backend takes each parameter in the wrapper's own pass, and why."""
        report: BackendReport = self._pass.backend_report()
        return report

    # Checkpoints.

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's, with what the wrapper keeps for each parameter and in each group.

        Raises:
            RuntimeError: a distributed checkpoint is taken while weights for evaluation are in place: it
                would lose those for training.
        """
        with self._shared.lock:
            for before in self._optimizer_state_dict_pre_hooks.values():
                before(self)
            result = self._state_dict()
            for after in self._optimizer_state_dict_post_hooks.values():
                result = after(self, result) or result
            return result

    def _state_dict(self) -> dict[str, Any]:
        training = dict(self._shared.training or ())
        if callers.is_distributed_checkpoint():
            if training:
                name = type(self).__name__
                raise RuntimeError(
                    f"{name}: {self.evaluated} are in place, and a distributed checkpoint keeps no others: "
                    "call train() before"
                )
            if not self._inner.state:  # torch does not ask for it while there are gradients
                self.make_state()
        return joined(self, self._inner.state_dict(), training)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state_dict of this wrapper, or of the optimizer alone: then the wrapper starts anew.

        Raises:
            TypeError, ValueError: it does not fit. Nothing was changed.
        """
        shared = self._shared
        with shared.lock:
            for before in self._optimizer_load_state_dict_pre_hooks.values():
                state_dict = before(self, state_dict) or state_dict
            own, training, rest = taken_apart(self, state_dict)
            marks = self._adapted(own, state_dict["param_groups"])
            self._inner.load_state_dict(rest)
            self._pass.replace_state(own)
            shared.training = training or None
            for group, its in zip(self.param_groups, marks, strict=True):
                group.update(its)
            for after in self._optimizer_load_state_dict_post_hooks.values():
                after(self)

    def adapt(self, own: list[dict[str, Any]], saved: dict[str, Any]) -> dict[str, Any]:
        """Makes what another one of this class has saved of a group this one's own.

        Args:
            own: the states of its parameters, which may be changed.
            saved: its marks, those that are there; empty where there is nothing of the other's.

        Returns:
            The marks of the group from now on.

        Raises:
            ValueError: they cannot be this one's.
        """
        return self.marks()

    def _adapted(
        self, own: dict[torch.Tensor, dict[str, Any]], saved: list[dict[str, Any]]
    ) -> list[dict[str, Any]]:
        """Of each group the marks from now on: groups may be at places of their own in the cycle."""
        adapted = []
        for i, group in enumerate(self.param_groups):
            marks = {key: saved[i][key] for key in self.marks() if own and i < len(saved) and key in saved[i]}
            adapted.append(self.adapt([own[p] for p in group["params"] if p in own], marks))
        return adapted

    def __getstate__(self) -> dict[str, Any]:
        return {"_shared": self._shared}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Takes what `__getstate__` gave, or as torch's optimizers do groups and state of a checkpoint."""
        if "_shared" not in state:
            for name in ("param_groups", "state"):
                if name in state:
                    setattr(self, name, state[name])
            return
        defaults = state["_shared"].optimizer.defaults
        before = dict(defaults)
        super().__setstate__(state)  # adds to them
        for name in defaults.keys() - before.keys():
            del defaults[name]

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value}" for name, value in self.settings().items())
        return f"{type(self).__name__}({settings}) around {self._inner!r}"

    def settings(self) -> dict[str, Any]:
        """The arguments that it was made with, beside the optimizer."""
        return {}


class _Shared:
    """What a wrapper keeps. One object, which proxies of frameworks share: what is set through them would be
    their own.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, own_pass: ParameterPass) -> None:
        self.optimizer, self.own_pass = optimizer, own_pass
        self.stepped = False
        # the weights for training, while those for evaluation are in place
        self.training: list[tuple[torch.Tensor, torch.Tensor]] | None = None
        self.__setstate__({})

    def __getstate__(self) -> dict[str, Any]:
        return {name: x for name, x in self.__dict__.items() if name not in ("_own_lock", "requested")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.requested: Requested | None = None
        self._own_lock = threading.RLock()

    @property
    def lock(self) -> Any:
        """The one of the optimizer inside, if that has one: two could be taken in either order."""
        inner = self.optimizer
        return inner._shared.lock if isinstance(inner, Wrapper) else getattr(inner, "_lock", self._own_lock)


def _calls_once(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it calls a closure once, before its update."""
    return isinstance(optimizer, FusedOptimizer) or type(optimizer).__module__.startswith("torch.optim.")
