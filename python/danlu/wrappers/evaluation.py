"""Weights for evaluation in the place of those for training, and back."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from .order import Nested


class Evaluated(Nested):
    """A wrapper that may put other weights in place; while they are, no step is made."""

    _shared: Any  # what the wrapper keeps: `lock`, and `training`, the weights for training meanwhile

    # the weights for evaluation in messages, and the name of those for training in a state_dict
    evaluated: ClassVar[str] = ""
    training_key: ClassVar[str | None] = None

    def weights_for_evaluation(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Parameters with what takes their place; a wrapper that has none changes nothing."""
        return []

    def eval(self) -> None:
        shared = self._shared
        with shared.lock:
            super().eval()
            if shared.training is None and self.training_key is not None:
                self.put_in_place(self.weights_for_evaluation())

    def train(self) -> None:
        shared = self._shared
        with shared.lock:
            self.put_back()
            super().train()

    def put_in_place(self, weights: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Gives parameters other values, and keeps a copy of those that they have."""
        # copies of all first: parameters may lie over one memory
        self._shared.training = [(p, p.detach().clone()) for p, _ in weights]
        try:
            with torch.no_grad():
                for p, value in weights:
                    p.copy_(value)
        except BaseException:
            self.put_back()
            raise

    def put_back(self) -> None:
        """Ends what `put_in_place` began."""
        with torch.no_grad():
            for p, value in self._shared.training or ():
                p.copy_(value)
        self._shared.training = None

    def refuse_in_evaluation(self) -> None:
        """Raises while weights for evaluation are in place, here or further inside."""
        if self._shared.training is not None:
            name = type(self).__name__
            raise RuntimeError(
                f"{name}: {self.evaluated} are in place, a step would train them; "
                "train(), or the end of swap(), puts the weights back"
            )
        if isinstance(self._inner, Evaluated):
            self._inner.refuse_in_evaluation()
