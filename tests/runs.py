"""The run whose bits every backend must give."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

from cases import CASES, Case, Storage, set_gradient, values
from danlu.testing import same_bits
from layouts import LAYOUTS, Layout

STEPS = 6
Result = list[dict[str, torch.Tensor]]


def run(
    case: Case,
    storage: Storage,
    backend: str,
    *,
    device: torch.device | str = "cpu",
    wild: bool = True,
    steps: int = STEPS,
    layouts: Sequence[Layout] = LAYOUTS,
    **engine: Any,
) -> Result:
    """Parameters and states after some steps over the layouts, in two groups with settings of their own."""
    params = []
    for i, layout in enumerate(layouts):
        start = values(layout.shape, i, wild=wild).to(device, storage.param)
        params.append(torch.nn.Parameter(layout.param(start)))
    other: dict[str, Any] = {"params": params[1::2], "lr": 5e-3, "maximize": True}
    if case.hyper.get("weight_decay"):
        other["weight_decay"] = 0.0
    groups = [{"params": params[::2]}, other]
    opt = case.make(groups, backend=backend, state_dtype=storage.moment, **engine)
    for t in range(steps):
        opt.param_groups[0]["lr"] = case.hyper["lr"] / (t + 1)
        for i, (layout, p) in enumerate(zip(layouts, params, strict=True)):
            if (t + i) % 4 == 3:
                p.grad = None  # parameters are at different steps
            else:
                g = values(layout.shape, 1000 * (t + 1) + i, wild=wild).to(device, storage.grad)
                set_gradient(p, layout.grad(g))
        opt.step()
    return [{"param": p.detach(), **opt.state[p]} for p in params]


@functools.cache
def expected(case_id: str, storage: Storage, wild: bool = True) -> Result:
    return run(next(c for c in CASES if c.id == case_id), storage, "reference", wild=wild)


def assert_same(got: Result, want: Result, layouts: Sequence[Layout] = LAYOUTS) -> None:
    """`got` may be on a device."""
    different = [
        f"{layout.id}: {key}"
        for layout, a, b in zip(layouts, got, want, strict=True)
        for key in b
        if not same_bits(a[key].cpu(), b[key])
    ]
    assert not different, different


def assert_flushing_changes_nothing(case: Case, backend: str, size: int = 200_000) -> None:
    """Steps on subnormal values with a subnormal lr, with and without torch flushing such numbers to 0."""
    start = values((size,), 0) * 1e-30
    gradient = values((size,), 1) * 1e-30
    results = []
    for flush in (False, True):
        p = torch.nn.Parameter(start.clone())
        opt = case.make([p], lr=1e-39, backend=backend)
        p.grad = gradient
        opt.step()  # makes the state
        try:
            assert torch.set_flush_denormal(flush)
            for _ in range(3):
                opt.step()
            assert ((torch.tensor([1e-30]) * 1e-10).item() == 0.0) == flush
        finally:
            torch.set_flush_denormal(False)
        results.append({"param": p.detach(), **opt.state[p]})
    assert all(same_bits(results[0][key], results[1][key]) for key in results[0])
    assert not same_bits(results[0]["param"], start)
