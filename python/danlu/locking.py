"""One thread at a time in an optimizer."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

import torch


class _Locked(Protocol):
    @property
    def _lock(self) -> AbstractContextManager[Any]: ...


Self = TypeVar("Self", bound=_Locked)
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def one_at_a_time(
    method: Callable[Concatenate[Self, Arguments], Result],
) -> Callable[Concatenate[Self, Arguments], Result]:
    """The method, which holds `self._lock`: another thread waits, the same one may call again. A graph break
    under torch.compile.
    """

    @functools.wraps(method)
    def locked(self: Self, /, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        with self._lock:
            return method(self, *args, **kwargs)

    # torch.compiler.disable would import the compiler together with danlu
    disabled: Callable[Concatenate[Self, Arguments], Result]
    disabled = torch._disable_dynamo(locked)  # type: ignore[attr-defined]
    return disabled
