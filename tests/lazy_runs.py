"""Lazy steps over gradients of every kind, for comparisons of backends."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

import danlu
from cases import CASES, Case, Storage, set_gradient, values
from danlu.testing import same_bits

MODES = ("rows", "params")
LAZY = [case for case in CASES if "accumulation_steps" not in case.hyper]
SHAPES = [(50, 3), (7,), (300, 40), (1, 5), (5, 1), (2, 70_001), (0, 4), (4, 0), (20, 6, 5), (70, 997)]
STEPS = 6


def coo(rows: Any, rows_values: torch.Tensor, shape: Any, **flags: bool) -> torch.Tensor:
    indices = torch.as_tensor(rows, dtype=torch.int64).reshape(1, -1)
    return torch.sparse_coo_tensor(indices, rows_values, tuple(shape), check_invariants=False, **flags)


def some_rows(count: int, seed: int) -> torch.Tensor:
    """With neighbours and gaps, in no order."""
    generator = torch.Generator().manual_seed(seed)
    chosen = (torch.rand(count, generator=generator) < 0.4).nonzero()[:, 0]
    return chosen[torch.randperm(len(chosen), generator=generator)]


def dense(shape: tuple[int, ...], seed: int, *, wild: bool = True) -> torch.Tensor:
    """Some rows of numbers; of the others some are zeros of either sign, some hold one odd number."""
    g = torch.zeros(shape)
    rows = some_rows(shape[0], seed)
    g[rows] = values((len(rows), *shape[1:]), seed, wild=wild)
    if wild and g.numel():
        flat = g.view(shape[0], -1)
        for i, odd in enumerate((-0.0, float("nan"), 1e-45)):
            flat[i::11][:, -1:][flat[i::11].eq(0).all(1)] = odd
    return g


def listed(shape: tuple[int, ...], seed: int, dtype: torch.dtype, *, wild: bool = True) -> torch.Tensor:
    """Rows in no order, some of them two and three times, the last of zeros."""
    rows = some_rows(shape[0], seed)
    last = len(rows) - 1
    rows = torch.cat([rows, rows[: (len(rows) + 2) // 3], rows[: len(rows) // 5]])
    rows_values = values((len(rows), *shape[1:]), seed, wild=wild).to(dtype)
    if last >= 0:
        rows_values[last] = 0
    return coo(rows, rows_values, shape)


@functools.cache
def gradient(
    shape: tuple[int, ...], seed: int, kind: int, dtype: torch.dtype, **how: bool
) -> torch.Tensor | None:
    """Of one of six kinds."""
    if kind == 0:
        return None
    if kind in (1, 2):
        return dense(shape, seed, **how).to(dtype)
    if kind == 3:
        return coo([], torch.zeros((0, *shape[1:]), dtype=dtype), shape)
    g = listed(shape, seed, dtype, **how)
    return g if kind == 4 else g.coalesce()


def run(
    case: Case,
    storage: Storage,
    backend: str,
    mode: str,
    device: str | torch.device = "cpu",
    shapes: Sequence[tuple[int, ...]] = SHAPES,
    **engine: Any,
) -> list[dict[str, torch.Tensor]]:
    """Parameters and states after steps with gradients of every kind, in two lazy groups and another."""

    def parameter(shape: tuple[int, ...], seed: int) -> torch.nn.Parameter:
        return torch.nn.Parameter(values(shape, seed).to(device, storage.param))

    params = [parameter(shape, i) for i, shape in enumerate(shapes)]
    plain = parameter((33, 5), 99)
    other: dict[str, Any] = {"params": params[1::2], "lr": 5e-3, "maximize": True, "lazy": True}
    if case.hyper.get("weight_decay"):
        other["weight_decay"] = 0.0
    groups = [{"params": params[::2], "lazy": True}, other, {"params": [plain], "lazy": False}]
    opt = danlu.Lazy(case.make(groups, backend=backend, state_dtype=storage.moment, **engine), mode)
    for t in range(STEPS):
        opt.param_groups[0]["lr"] = case.hyper["lr"] / (t + 1)
        for i, (shape, p) in enumerate(zip(shapes, params, strict=True)):
            p.grad = None
            g = gradient(shape, 1000 * (t + 1) + i, (t + i) % 6, storage.grad)
            if g is not None:
                set_gradient(p, g.to(device))
        set_gradient(plain, dense((33, 5), t).to(device, storage.grad))
        opt.step()
    if backend != "reference":
        assert {row.backend for row in opt.backend_report()} == {backend}
    return [{"param": p.detach(), **opt.state[p]} for p in (*params, plain)]


def assert_same(
    got: list[dict[str, torch.Tensor]],
    want: list[dict[str, torch.Tensor]],
    shapes: Sequence[tuple[int, ...]] = SHAPES,
) -> None:
    names = [*map(str, shapes), "plain"]
    different = [
        f"{name}: {key}"
        for name, a, b in zip(names, got, want, strict=True)
        for key in b
        if not same_bits(a[key], b[key])
    ]
    assert not different, different
