"""Sizes that broke other libraries: huge tensors, very many tensors, empty tensors."""

from __future__ import annotations

import os

import pytest
import torch

import danlu
from cases import ALL, BF16, Case, values
from danlu.testing import same_bits


def available_bytes() -> int:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(
    available_bytes() < 12 << 30 and not os.environ.get("CI"), reason="needs 12 GB of free memory"
)
@pytest.mark.full
def test_more_elements_than_an_int32_counts() -> None:
    size = 2**31 + 70_001
    where = torch.tensor([0, 65_535, 65_536, 2**31 - 1, 2**31, 2**31 + 65_536, size - 1])
    p = torch.nn.Parameter(torch.zeros(size, dtype=BF16), requires_grad=False)
    p.grad = torch.zeros(size, dtype=BF16)  # zero pages that are only read take no memory
    p.grad[where] = 1.0
    opt = danlu.Lion([p], lr=1.0, betas=(0.5, 0.5), state_dtype=BF16, backend="cpu")
    opt.step()
    assert (p[where] == -1.0).all()
    assert (opt.state[p]["exp_avg"][where] == 0.5).all()
    assert sum(int(part.count_nonzero()) for part in p.split(2**28)) == len(where)


@pytest.mark.parametrize(
    "backend", ["cpu", "cuda", pytest.param("reference", marks=pytest.mark.full)], indirect=True
)
def test_twenty_thousand_tensors_in_one_group(backend: str) -> None:
    params = [torch.nn.Parameter(torch.full((i % 7,), float(i))) for i in range(20_000)]
    for p in params:
        p.grad = torch.ones_like(p)
    opt = danlu.Lion(params, lr=0.5, backend=backend)
    for _ in range(2):
        opt.step()
    assert all((p == i - 1.0).all() for i, p in enumerate(params))
    assert all(opt.state[p]["step"] == 2 for p in params)


@pytest.mark.pairs
@pytest.mark.parametrize("case", ALL, ids=lambda c: c.id)
@pytest.mark.parametrize("empty", [(0,), (3,), (0, 3, 6), tuple(range(7))], ids=str)
def test_empty_tensors_step_along(case: Case, empty: tuple[int, ...], backend: str) -> None:
    def run(shapes: list[tuple[int, ...]]) -> tuple[list[torch.nn.Parameter], danlu.FusedOptimizer]:
        params = [torch.nn.Parameter(values(shape, i, wild=False)) for i, shape in enumerate(shapes)]
        opt = case.make([{"params": params[:4]}, {"params": params[4:]}, {"params": []}], backend=backend)
        for t in range(3):
            for i, p in enumerate(params):
                p.grad = values(p.shape, 10 * t + i, wild=False)
            opt.step()
        return params, opt

    full = [(5, 2)] * 7
    want, _ = run(full)
    got, opt = run([(0, 2) if i in empty else shape for i, shape in enumerate(full)])
    updates = 3 // case.hyper.get("accumulation_steps", 1)
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert opt.state[a]["step"] == updates
        assert i in empty or same_bits(a, b)


def test_groups_without_parameters(backend: str) -> None:
    opt = danlu.AdamW([{"params": []}], backend=backend)
    opt.step()
    p = torch.nn.Parameter(torch.ones(3))
    opt.add_param_group({"params": [p], "lr": 0.5, "weight_decay": 0.0})
    p.grad = torch.ones(3)
    opt.step()
    assert torch.allclose(p, torch.full((3,), 0.5))
