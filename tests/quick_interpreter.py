"""Triton's interpreter, without what it does again and again: two thirds of its time."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def patch_once() -> None:
    """For good: nothing in a process that interprets is compiled."""
    module: Any = interpreter
    # what is in triton.language: a search of 4 ms for each launch and each call of a function
    module._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    module._patch_lang = lambda function: interpreter._LangPatchScope()
    # whether integers overflow is computed for each addition, and looked at in debug mode alone
    builder = module.interpreter_builder
    assert not builder.options.debug
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    module._get_np_dtype = _remembered(module._get_np_dtype)


def _remembered(np_dtype_of: Any) -> Any:
    """It makes a table of all dtypes in each call."""
    known: dict[str, np.dtype[Any]] = {}

    def of(dtype: Any) -> np.dtype[Any]:
        scalar = dtype.scalar
        if isinstance(scalar, tl.pointer_type):
            return np_dtype_of(scalar)
        if scalar.name not in known:
            known[scalar.name] = np_dtype_of(scalar)
        return known[scalar.name]

    return of
