"""The base class of optimizers that do something around the steps of another one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch

from ..optimizer import FusedOptimizer
from ..report import BackendReport
from .order import Nested
from .parameter_pass import ParameterPass, make_state


class Wrapper(Nested, torch.optim.Optimizer):
    """Steps `optimizer`, and makes passes of its own over the same parameters.

    Parameter groups, defaults and state are the optimizer's own objects, so that schedulers and trainers may
    hold either. What the wrapper keeps beside them is in its state_dict: for each parameter a state, in each
    group a number.

    Args:
        optimizer: one of danlu's or of torch's, or a wrapper around one; schedulers may come before or after.

    Attributes:
        optimizer: the one that is wrapped.
        stepped: whether the last call of `step()` moved the parameters.
    """

    optimizer: torch.optim.Optimizer
    stepped: bool
    position: int
    _pass: ParameterPass

    # the key in each group of a state_dict under which `position`, the place in a cycle, is kept
    position_key: ClassVar[str | None] = None

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls._step = torch._disable_dynamo(cls._step)  # type: ignore[attr-defined,method-assign]

    def __init__(self, optimizer: torch.optim.Optimizer, own_pass: ParameterPass) -> None:
        # torch's own __init__ would make groups and state
        self.__setstate__({"optimizer": optimizer, "_pass": own_pass, "position": 0, "stepped": False})

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
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        return self.optimizer.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        return self.optimizer.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        return self.optimizer.defaults

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self.optimizer.add_param_group(param_group)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One call a gradient, as for any optimizer; the closure's loss is passed on.

        Raises:
            RuntimeError: the class says when.
            TypeError, ValueError: a tensor cannot be stepped; the message names its parameter.
        """
        if closure is None and self._is_asked_for_state():
            self.make_state()
            return None
        return self._step(closure)

    def _is_asked_for_state(self) -> bool:
        """Whether this is how torch.distributed.checkpoint makes state before it reads or writes any: by a
        first step with an lr and gradients of zero.
        """
        if self.state or self.stepped or any(group.get("lr", 0.0) != 0 for group in self.param_groups):
            return False
        gradients = [p.grad for p in self._pass.parameters() if p.requires_grad]
        return bool(gradients) and all(g is not None and _is_zero(g) for g in gradients)

    def make_state(self) -> None:
        """Makes all state that steps would, the optimizer's and the wrapper's, and counts no step."""
        if isinstance(self.optimizer, Wrapper):
            self.optimizer.make_state()
        elif isinstance(self.optimizer, FusedOptimizer):
            make_state(self.optimizer)
        else:
            self.optimizer.step()
            for held in self.optimizer.state.values():
                if "step" in held:
                    held["step"] *= 0  # a number or a tensor
        make_state(self._pass)

    def _step(self, closure: Callable[[], Any] | None) -> Any:
        raise NotImplementedError

    def refuse_capture(self) -> None:
        """Raises inside the capture of a CUDA graph."""
        on_gpu = any(p.is_cuda for group in self.param_groups for p in group["params"][:1])
        if on_gpu and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"{type(self).__name__}: a CUDA graph cannot count steps; capture the optimizer's"
            )

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)

    def backend_report(self) -> BackendReport:
        """Which backend takes each parameter in the wrapper's own pass, and why."""
        return self._pass.backend_report()

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's, with what the wrapper keeps for each parameter and in each group."""
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        inner = self.optimizer.state_dict()
        states = {
            key: dict(value) if isinstance(value, dict) else value for key, value in inner["state"].items()
        }
        for index, (_, p) in self._numbered():
            saved = self.saved_state(p)
            if saved:
                states.setdefault(index, {}).update(saved)
        mark = {} if self.position_key is None else {self.position_key: self.position}
        groups = [{**group, **mark} for group in inner["param_groups"]]
        result = {**inner, "state": states, "param_groups": groups}
        for after in self._optimizer_state_dict_post_hooks.values():
            result = after(self, result) or result
        return result

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state_dict of this wrapper, or of the optimizer alone: then the wrapper starts anew.

        Raises:
            TypeError, ValueError: it does not fit. Nothing was changed.
        """
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = before(self, state_dict) or state_dict
        own, position, rest = self._taken_apart(state_dict)
        self.optimizer.load_state_dict(rest)
        self._pass.state.clear()
        self._pass.state.update(own)
        self._pass._plan = None
        self.position = position
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def saved_state(self, p: torch.Tensor) -> dict[str, Any]:
        """What the wrapper keeps of a parameter in a state_dict."""
        return self._pass.saved(p)

    def check_position(self, position: Any) -> None:
        """Raises ValueError unless a state_dict may hold it."""

    def _taken_apart(
        self, state_dict: dict[str, Any]
    ) -> tuple[dict[torch.Tensor, dict[str, Any]], int, dict[str, Any]]:
        """States and position of this wrapper, and what is left for the optimizer."""
        ours = self._pass.saved_keys()
        states, own = {}, {}
        for key, value in state_dict["state"].items():
            states[key] = value
            if isinstance(value, dict) and ours & set(value):
                rest = {name: x for name, x in value.items() if name not in ours}
                if rest:
                    states[key] = rest
                else:
                    del states[key]
        by_index = dict(self._numbered(state_dict["param_groups"]))
        for index, (name, p) in by_index.items():
            found = self._pass.take_saved(name, p, state_dict["state"].get(index, {}))
            if found:
                own[p] = found
        groups, position = [], 0
        for group in state_dict["param_groups"]:
            position = group.get(self.position_key, position)
            groups.append({key: value for key, value in group.items() if key != self.position_key})
        self.check_position(position)
        return own, position, {**state_dict, "state": states, "param_groups": groups}

    def _numbered(
        self, saved_groups: list[dict[str, Any]] | None = None
    ) -> list[tuple[int, tuple[str, torch.Tensor]]]:
        """Parameters with names, under the numbers of torch's state_dict, or those of `saved_groups`."""
        numbers: dict[int, int] = {}
        count = 0
        for i, group in enumerate(self.param_groups):
            saved = saved_groups[i]["params"] if saved_groups and i < len(saved_groups) else []
            for j, p in enumerate(group["params"]):
                numbers.setdefault(id(p), saved[j] if j < len(saved) else count)
                count += 1
        return [(numbers[id(p)], (name, p)) for name, p in self._pass.names()]

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("optimizer", "_pass", "position", "stepped")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        defaults = state["optimizer"].defaults
        before = dict(defaults)
        super().__setstate__(state)  # adds to them
        for name in defaults.keys() - before.keys():
            del defaults[name]

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value}" for name, value in self.settings().items())
        return f"{type(self).__name__}({settings}) around {self.optimizer!r}"

    def settings(self) -> dict[str, Any]:
        """The arguments that it was made with, beside the optimizer."""
        return {}


def _is_zero(g: torch.Tensor) -> bool:
    """Of a DTensor all shards, so that every rank has the same answer."""
    if g.is_sparse:
        return False
    norm: Any = torch.linalg.vector_norm(g)
    return not (norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
