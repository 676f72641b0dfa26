"""Lookahead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .. import checks
from .parameter_pass import ParameterPass
from .wrapper import Wrapper


class Lookahead(Wrapper):
    """Slow weights that follow the optimizer's fast ones (Zhang et al. 2019, arXiv:1907.08610).

        slow = p                                     before the first step
        slow = slow + alpha * (p - slow)             after every k steps,
        p = slow                                     from where the optimizer goes on with the state it has

    One pass every k steps reads and writes p and slow: 16 bytes a parameter in fp32. Slow weights are float32
    whatever the parameter's dtype.

    Args:
        optimizer: one of danlu's or of torch's, or `EMA` around one.
        k: steps of the optimizer for one of the slow weights, at least 1.
        alpha: the slow weights' step size, in (0, 1].

    `eval()` puts the slow weights in the parameters' place, `train()` puts the fast ones back. A step between
    them raises RuntimeError. So does a step inside the capture of a CUDA graph, which cannot count to k.
    After an evaluation under `fully_shard`, call the model's `reshard()` before either: its root module keeps
    the weights that it has gathered. A parameter that joins late gets its slow weights then. One that could
    not have a gradient (of an integer dtype, say) has none.

    The state_dict adds `slow` for each parameter, and the steps since the last synchronization, to the
    optimizer's state. Taken with the slow weights in place, it holds the others as `fast`.

    Raises:
        ValueError: k or alpha is out of its range.
        TypeError: the optimizer cannot be wrapped.

    >>> p = torch.nn.Parameter(torch.tensor([0.0]))
    >>> opt = danlu.Lookahead(danlu.Lion([p], lr=1.0), k=3, alpha=0.5)
    >>> for _ in range(3):
    ...     p.grad = torch.tensor([-1.0])
    ...     opt.step()
    ...     print(p.item())
    1.0
    2.0
    1.5
    """

    rank = 3
    position_key = "lookahead_steps"
    evaluated = "the slow weights"
    training_key = "fast"

    def __init__(self, optimizer: torch.optim.Optimizer, k: int = 5, alpha: float = 0.5) -> None:
        self.check_order(optimizer)
        checks.positive_int("k", k)
        checks.share("alpha", alpha)
        super().__init__(optimizer, _Slow(optimizer, k, alpha))

    @property
    def k(self) -> int:
        return int(self._pass.k)

    @property
    def alpha(self) -> float:
        return float(self._pass._hyper["alpha"])

    def _step(self, closure: Callable[[], Any] | None) -> Any:
        self.refuse_capture()
        if self.position == 0 and not self._pass.moved:
            self._pass.forget_untouched()
        self._pass.start()
        return self.step_inner(closure)

    def count_update(self) -> None:
        super().count_update()
        self._pass.moved = True
        self.position += 1
        if self.position >= self.k:
            self._pass.run()
            self.position = 0

    def weights_for_evaluation(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        self._pass.start()
        return [(p, held["slow"]) for p, held in self._pass.state.items()]

    def adapt(self, own: list[dict[str, Any]], saved: dict[str, Any]) -> dict[str, Any]:
        position = saved.get(self.position_key, 0)
        self.check_position(position)
        return {self.position_key: position}

    def check_position(self, position: Any) -> None:
        if not isinstance(position, int) or not position >= 0:
            raise ValueError(f"{self.position_key} must be an integer of at least 0, got {position!r}")

    def settings(self) -> dict[str, Any]:
        return {"k": self.k, "alpha": self.alpha}


class _Slow(ParameterPass):
    _rule = "lookahead"
    state_names = ("slow",)
    takes_gradients = False
    outcome = "assigned"
    moved = False  # whether the fast weights have left the slow ones

    def __init__(self, optimizer: torch.optim.Optimizer, k: int, alpha: float) -> None:
        super().__init__(optimizer, alpha=alpha)
        self.k = k

    def forget_untouched(self) -> None:
        """Drops slow weights that a checkpoint or `eval()` asked for before the first step: parameters may
        have been loaded since.
        """
        for p in self.parameters():
            if p in self.state and self.state[p]["step"].item() == 0:
                del self.state[p]
                self.look_again()

    def initial_state(self, name: str, p: torch.Tensor, reduced: tuple[int, ...] = ()) -> torch.Tensor:
        dtype = self.state_dtype(name, p)
        return torch.empty_like(p, dtype=dtype, requires_grad=False).copy_(p.detach())

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "k": self.k}

    @staticmethod
    def coefficients(math: Any, *, step: Any, alpha: float) -> dict[str, Any]:
        return dict(alpha=alpha)

    @staticmethod
    def reference(
        p: torch.Tensor, g: torch.Tensor, slow: torch.Tensor, *, step: float, alpha: float
    ) -> torch.Tensor:
        slow.add_((p - slow) * alpha)
        return slow
