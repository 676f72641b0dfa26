"""What a wrapper has to know of the step of an optimizer that it did not write."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch


class UpdateMade:
    """Whether an optimizer has made its update: a step that returns has, and one in which a hook raises that
    runs after the update.

    Attributes:
        made: true from the end of the update on.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer: Any = optimizer
        self.made = False

    def __enter__(self) -> UpdateMade:
        self._handle: Any = None
        hooks = getattr(self._optimizer, "_optimizer_step_post_hooks", None)
        if hooks is not None:  # some that stand for an optimizer have none
            self._handle = self._optimizer.register_step_post_hook(self._note)
            hooks.move_to_end(self._handle.id, last=False)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._handle is not None:
            self._handle.remove()
        self.made = self.made or kind is None

    def _note(self, *_: Any) -> None:
        self.made = True


class Requested:
    """State of one of torch's optimizers that a checkpoint has asked for before the first step.

    It is made by a step with an lr and gradients of zero, which is all that such an optimizer offers. Without
    decay nothing but zeros reaches the moments, and counters begin at 0. Should the first real step come
    before anybody has loaded other state, `drop` removes it: some optimizers tell a first step by having no
    state.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer: Any = optimizer
        groups = [dict(group) for group in optimizer.param_groups]
        params = [p for group in groups for p in group["params"] if p.requires_grad]
        gradients = [(p, p.grad) for p in params]
        weights = [p.detach().clone() for p in params]
        hooks = self._without_hooks()
        try:
            for group in optimizer.param_groups:
                for name in group.keys() & {"lr", "weight_decay"}:
                    value = group[name]
                    group[name] = torch.zeros_like(value) if isinstance(value, torch.Tensor) else 0.0
            for p, gradient in gradients:
                p.grad = None
                p.grad = torch.zeros_like(p if gradient is None else gradient)  # sparse, where that is
            optimizer.step()
        finally:
            self._optimizer.__dict__.update(hooks)
            for group, before in zip(optimizer.param_groups, groups, strict=True):
                group.clear()  # some count in the group
                group.update(before)
            with torch.no_grad():
                for (p, gradient), weight in zip(gradients, weights, strict=True):
                    p.grad = None
                    p.grad = gradient
                    p.copy_(weight)  # 0 / 0 is NaN, and some step by more than lr
        for held in optimizer.state.values():
            if "step" in held:
                held["step"] *= 0  # a number or a tensor
            if "mu_product" in held:  # NAdam's
                held["mu_product"] = held["mu_product"] * 0 + 1
        self._state = optimizer.state
        self._values = self._versions()

    def _without_hooks(self) -> dict[str, Any]:
        """Takes the user's hooks away, for which this is no step; gives what puts them back."""
        names = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
        hooks = {name: x for name, x in self._optimizer.__dict__.items() if name in names}
        self._optimizer.__dict__.update((name, type(x)()) for name, x in hooks.items())
        return hooks

    def drop(self) -> None:
        """Takes the state away, unless it has been replaced or written since."""
        if self._optimizer.state is self._state and self._versions() == self._values:
            self._state.clear()

    def _versions(self) -> list[tuple[int, int]]:
        tensors = (x for held in self._state.values() for x in held.values() if isinstance(x, torch.Tensor))
        return [(id(x), x._version) for x in tensors]
