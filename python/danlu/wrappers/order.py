"""What all wrappers have in common: an optimizer inside, and the order in which they nest."""

from __future__ import annotations

from typing import Any, ClassVar


class Nested:
    """A wrapper of an optimizer; one of greater rank may wrap those of lower rank.

    1 `LayerAdaptation`, 2 `Lazy`, 3 `Lookahead` and `EMA` in either order, 4 `GradientAccumulation`.
    """

    rank: ClassVar[int]
    # Code of danlu takes the optimizer inside from here: Lightning and Fabric hand out proxies whose class is
    # made from the wrapper's and whose own `optimizer` is the wrapper itself.
    _inner: Any

    @property
    def optimizer(self) -> Any:
        """The optimizer inside."""
        return self._inner

    def eval(self) -> None:
        """Puts the weights for evaluation in place, where a wrapper inside has such."""
        inner = getattr(self._inner, "eval", None)
        if callable(inner):
            inner()

    def train(self) -> None:
        """Puts the weights for training back."""
        inner = getattr(self._inner, "train", None)
        if callable(inner):
            inner()

    @classmethod
    def check_order(cls, optimizer: Any) -> None:
        """Raises unless this wrapper may hold `optimizer`.

        Raises:
            TypeError: it has to be around this one, or is of the same kind; the message gives the order.
        """
        inner: Any = optimizer
        while isinstance(inner, Nested):
            name, kind = cls.__name__, type(inner).__name__
            if type(inner) is cls:
                raise TypeError(f"optimizer is wrapped in {name} already")
            if inner.rank > cls.rank:
                raise TypeError(f"{name} goes inside {kind}, not around it: {kind}({name}(optimizer))")
            inner = inner._inner
