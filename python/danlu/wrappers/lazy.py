"""Lazy steps of embeddings."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from .. import checks
from ..locking import one_at_a_time
from ..optimizer import FusedOptimizer
from ..plan import refuse_flattened
from ..report import BackendReport
from .derived import Derived, Inner
from .layer_adaptation import LayerAdaptation

MODES = ("rows", "params")


class Lazy(Derived):
    """Updates only rows with a gradient: those a sparse gradient lists, or a dense gradient's nonzero rows.

    A row is one index of the first dimension: in an embedding, the vector of one token. A sparse gradient
    (`torch.sparse_coo`, as `torch.nn.Embedding(sparse=True)` gives) updates every row that it lists, whatever
    the values. A row listed more than once gets the sum of its entries, added in their order and rounded to
    the gradient's dtype. The other rows keep their parameters, without decay, and

        mode="rows"      keep their moments, too: a step costs what the updated rows cost
                         (as torch.optim.SparseAdam);
        mode="params"    update their moments as with a gradient of zeros: the rule sees all the time that has
                         passed (Jianlin Su, kexue.fm/archives/6869). Decay that is part of the gradient, as
                         in Adam and AdaX, counts as zero there.

    Bias corrections follow the parameter's `step`, which counts every gradient, whatever rows it has. Without
    `Lazy` a sign rule moves the vectors of rare tokens towards 1 / weight_decay: the sign of a moment stays
    long after the moment has decayed.

    Args:
        optimizer: `Lion`, `Tiger`, `Adam`, `AdamW`, `AdaX`, `AdaXW`, or one of a class made by
            `danlu.custom`; with mode="params" also `LayerAdaptation`. Both share settings, options,
            param_groups and state. A scheduler may take either; call `step()` on this one.
        mode: how to treat rows without a gradient, "rows" or "params".

    All parameters are lazy, unless a group has a key "lazy": then only groups where it is true. The others
    step as without `Lazy` and take only dense gradients. `max_grad_norm` sees the summed values of a sparse
    gradient. On a GPU the host computes the addresses of the rows. So a step waits for the device, and raises
    inside the capture of a CUDA graph. `EMA`, `Lookahead` and `GradientAccumulation` wrap it; the last takes
    dense gradients.

    State per parameter: the inner optimizer's, under the same names.

    Raises:
        TypeError: `optimizer` is not one of danlu's, is lazy already, has a rule that sums over tensors, or
            accumulates gradients. In a step: a gradient is sparse in another way than by rows.
        ValueError: mode is neither. In a step: a lazy parameter has no dimension, or a gradient lists rows
            that it does not have.

    >>> embedding = torch.nn.Embedding(3, 2, sparse=True, _weight=torch.ones(3, 2))
    >>> opt = danlu.Lazy(danlu.Lion(embedding.parameters(), lr=0.25, weight_decay=1.0))
    >>> embedding(torch.tensor([1])).sum().backward()
    >>> opt.step()
    >>> embedding.weight.tolist()
    [[1.0, 1.0], [0.5, 0.5], [1.0, 1.0]]
    """

    rank = 2
    mode: str
    # whether groups say which of them are lazy; proxies of frameworks write it, too, and where all see it
    _selective: Any = Inner()

    def __init__(self, optimizer: FusedOptimizer, mode: str = "rows") -> None:
        super().__init__(optimizer)
        checks.one_of("mode", mode, MODES)
        self.mode = mode
        self._read_groups()
        refuse_flattened(self)

    def sparse_mode(self, group: dict[str, Any]) -> str | None:
        return self.mode if self._is_lazy(group) else None

    def structure(self, group: dict[str, Any]) -> Hashable:
        return self._inner.structure(group), self._is_lazy(group)

    @one_at_a_time
    def backend_report(self) -> BackendReport:
        self._read_groups()
        return super().backend_report()

    @one_at_a_time
    def _step(self) -> None:
        self._read_groups()
        super()._step()

    def _read_groups(self) -> None:
        """What groups say may have changed since the last step."""
        self._check_inner()
        self._selective = self._groups_say()

    def _groups_say(self) -> bool:
        return any("lazy" in group for group in self.param_groups)

    def _is_lazy(self, group: dict[str, Any]) -> bool:
        return bool(group.get("lazy", not self._selective))

    def _check_inner(self) -> None:
        inner = self._inner
        name = type(inner).__name__
        adapted = isinstance(inner, LayerAdaptation)
        if inner.reduces and not (adapted and self.mode == "params"):
            what = "mode='rows'" if adapted else "Lazy"
            raise TypeError(
                f"optimizer must have a rule that takes each element by itself: {name} sums over tensors, "
                f"and {what} shows it some of their rows"
                + ("; Lazy(LayerAdaptation(optimizer), mode='params') shows it all" if adapted else "")
            )
        if any(inner.accumulation_steps(group) > 1 for group in self.param_groups):
            raise TypeError(
                "accumulation_steps must be 1 for an optimizer inside Lazy, where a row may take part in one "
                "gradient of several; GradientAccumulation may wrap Lazy"
            )

    def __repr__(self) -> str:
        return f"Lazy(mode={self.mode!r}) around {self._inner!r}"

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "mode": self.mode}

    def __setstate__(self, loaded: dict[str, Any]) -> None:
        super().__setstate__(loaded)
        self._selective = self._groups_say()
