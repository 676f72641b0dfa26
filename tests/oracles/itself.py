"""An optimizer against itself: its reference in float64, and its own run taken up again half way."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch

import danlu
from cases import F32, F64, values
from training import all_same, copies, train

# Over some steps: fp32 roundings of states and parameters, a sum's among them.
FP32 = 1e-6

# from parameters and a backend
Make = Callable[..., danlu.FusedOptimizer]


def normwise(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Norm of the difference over the norm; NaN, which is below no bound, where there is one."""
    theirs = theirs.double()
    return ((ours.double() - theirs).norm() / theirs.norm().clamp(min=1e-300)).item()


def assert_as_in_float64(
    make: Make, shapes: Sequence[tuple[int, ...]], backend: str, steps: int = 10
) -> None:
    """fp32 on the backend against float64 normwise; no parameter went elsewhere."""
    starts = [0.1 * values(shape, i, wild=False) for i, shape in enumerate(shapes)]
    ours, exact = ([torch.nn.Parameter(start.to(dtype)) for start in starts] for dtype in (F32, F64))
    opt, double = make(ours, backend=backend), make(exact, backend="reference")
    for t in range(steps):
        for i, (p, q) in enumerate(zip(ours, exact, strict=True)):
            p.grad = values(p.shape, 100 * (t + 1) + i, wild=False)
            q.grad = p.grad.double()
        opt.step()
        double.step()
    rows = opt.backend_report()
    assert {row.backend for row in rows} == {backend}, str(rows)
    for p, q in zip(ours, exact, strict=True):
        if p.numel():
            found, wanted = {"param": p.detach(), **opt.state[p]}, {"param": q.detach(), **double.state[q]}
            for name in wanted:
                assert normwise(found[name], wanted[name]) < FP32, (p.shape, name)


def assert_resumes(make: Make, shapes: Sequence[tuple[int, ...]], backend: str) -> None:
    """Saved and loaded, or copied, after 3 of 6 steps: the same bits."""
    params = [torch.nn.Parameter(values(shape, i, wild=False)) for i, shape in enumerate(shapes)]
    opt = make(params, backend=backend)
    train(opt, range(3))
    copied = copy.deepcopy(opt)
    loaded = make([torch.nn.Parameter(p.detach().clone()) for p in params], backend=backend)
    loaded.load_state_dict(copy.deepcopy(opt.state_dict()))
    for other in (opt, copied, loaded):
        train(other, range(3, 6))
        assert {row.backend for row in other.backend_report()} == {backend}
        assert all_same(copies(other), copies(opt))
