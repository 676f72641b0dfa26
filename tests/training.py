"""Small parameters and steps for tests of how an optimizer behaves."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from cases import values
from danlu.testing import same_bits
from danlu.wrappers.parameter_pass import innermost


def some_params(count: int = 3) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(values((4, i + 1), i, wild=False)) for i in range(count)]


def parameters(opt: torch.optim.Optimizer) -> list[torch.nn.Parameter]:
    return [p for group in opt.param_groups for p in group["params"]]


def give_gradients(params: Iterable[torch.Tensor], t: int, factor: float = 1.0) -> None:
    for i, p in enumerate(params):
        p.grad = values(p.shape, 100 * t + i, wild=False) * factor


def train(opt: torch.optim.Optimizer, steps: Iterable[int]) -> None:
    for t in steps:
        give_gradients(parameters(opt), t)
        opt.step()


def everything(opt: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Parameters and states in their order, those of the optimizer inside all wrappers."""
    state = innermost(opt).state
    return [t for p in parameters(opt) for t in (p, *state.get(p, {}).values())]


def copies(opt: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [t.detach().clone() for t in everything(opt)]


def all_same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(same_bits(x, y) for x, y in zip(a, b, strict=True))


def check_found_inf(opt: torch.optim.Optimizer) -> None:
    """A step changes nothing where a scaler has found infinities, to the bit, and the next one goes on."""
    give_gradients(parameters(opt), 0)
    opt.step()
    before = copies(opt)
    opt.found_inf = torch.tensor([1.0])  # type: ignore[attr-defined]
    opt.step()
    assert all_same(everything(opt), before)
    opt.found_inf = torch.tensor([0.0])  # type: ignore[attr-defined]
    opt.step()
    assert not all_same(everything(opt), before)
