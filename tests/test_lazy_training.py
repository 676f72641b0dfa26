"""Lazy optimizers in use: checkpoints, groups, schedules, wrappers, embeddings, rules of one's own."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

import danlu
from cases import BF16, F16, F32, values
from danlu.testing import same_bits
from layouts import permuted
from lazy_runs import LAZY, MODES, coo, dense, gradient

every_case = pytest.mark.parametrize("case", LAZY, ids=lambda c: c.id)
every_mode = pytest.mark.parametrize("mode", MODES)


@every_mode
def test_the_dtype_of_a_listed_gradient_may_change(mode: str, backend: str) -> None:
    p = torch.nn.Parameter(torch.zeros(4, 3, dtype=BF16))
    opt = danlu.Lazy(danlu.Tiger([p], beta=0.0, backend=backend), mode)
    for dtype in (F32, BF16, F16, F32):
        p.grad = None
        p.grad_dtype = dtype
        p.grad = coo([2, 1], torch.tensor([[1.5] * 3, [-2.5] * 3], dtype=dtype), (4, 3))
        opt.step()
        assert opt.state[p]["exp_avg"][1:3, 0].tolist() == [-2.5, 1.5]
    assert [row.backend for row in opt.backend_report()] == [backend]


def test_which_groups_are_lazy(backend: str) -> None:
    def moved(*keys: dict[str, bool], change: Callable[[Any], None] = lambda opt: None) -> list[bool]:
        params = [torch.nn.Parameter(torch.ones(2, 2)) for _ in keys]
        groups = [{"params": [p], **key} for p, key in zip(params, keys, strict=True)]
        opt = danlu.Lazy(danlu.Lion(groups, lr=0.1, weight_decay=1.0, backend=backend))
        for _ in range(2):
            for p in params:
                p.data.fill_(1.0)
                p.grad = torch.tensor([[1.0, 1.0], [0.0, 0.0]])
            opt.step()
            change(opt)
        return [not same_bits(p[1], torch.ones(2)) for p in params]

    lazy, usual, unsaid = {"lazy": True}, {"lazy": False}, {}
    assert moved(unsaid, unsaid) == [False, False]
    assert moved(lazy, unsaid, usual) == [False, True, True]
    assert moved(unsaid, usual) == [True, True]

    def flip(opt: danlu.Lazy) -> None:
        opt.param_groups[0]["lazy"] = not opt.param_groups[0].get("lazy", True)

    assert moved(lazy, usual, change=flip) == [True, True]
    assert moved(usual, usual, change=flip) == [False, True]
    assert moved(unsaid, unsaid, change=flip) == [True, True]


@every_mode
def test_checkpoints_in_the_middle(mode: str, backend: str) -> None:
    def made() -> tuple[torch.nn.Parameter, danlu.Lazy]:
        p = torch.nn.Parameter(values((20, 4), 0, wild=False))
        inner = danlu.AdamW([p], backend=backend, state_dtype=BF16)
        return p, danlu.Lazy(inner, mode)

    def train(p: torch.Tensor, opt: torch.optim.Optimizer, steps: range) -> None:
        for t in steps:
            p.grad = gradient((20, 4), t, t % 6, F32)
            opt.step()

    p, opt = made()
    train(p, opt, range(5))
    q, resumed = made()
    q.data.copy_(p)
    resumed.load_state_dict(pickle.loads(pickle.dumps(opt.state_dict())))
    copied = copy.deepcopy(opt)
    pickled = pickle.loads(pickle.dumps(opt))
    assert pickled.mode == copied.mode == mode
    train(p, opt, range(5, 11))
    train(q, resumed, range(5, 11))
    for other in (resumed, copied, pickled):
        (r,) = other.param_groups[0]["params"]
        if other is not resumed:
            train(r, other, range(5, 11))
        assert same_bits(r, p)
        assert all(same_bits(other.state[r][key], value) for key, value in opt.state[p].items())


@every_mode
def test_groups_added_and_schedulers(mode: str, backend: str) -> None:
    p, q = (torch.nn.Parameter(torch.ones(4, 3)) for _ in range(2))
    opt = danlu.Lazy(danlu.Lion([p], lr=1.0, backend=backend), mode)
    scheduler = torch.optim.lr_scheduler.StepLR(opt, 1, gamma=0.5)
    p.grad = coo([2], torch.ones(1, 3), (4, 3))
    opt.step()
    scheduler.step()
    opt.add_param_group({"params": [q], "lr": 0.25})
    q.grad = coo([0], torch.ones(1, 3), (4, 3))
    opt.step()
    assert p[:, 0].tolist() == [1.0, 1.0, -0.5, 1.0]
    assert q[:, 0].tolist() == [0.75, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@every_mode
def test_an_embedding_trains_as_with_dense_gradients(mode: str, dtype: torch.dtype) -> None:
    tables = []
    for sparse in (True, False):
        embedding = torch.nn.Embedding(30, 8, sparse=sparse, dtype=dtype)
        embedding.weight.data = values((30, 8), 0, wild=False).to(dtype)
        head = torch.nn.Linear(8, 4, dtype=dtype)
        for i, p in enumerate(head.parameters(), 1):
            p.data = values(p.shape, i, wild=False).to(dtype)
        groups = [
            {"params": embedding.parameters(), "lazy": True},
            {"params": head.parameters(), "lazy": False},
        ]
        opt = danlu.Lazy(danlu.AdamW(groups, lr=1e-2), mode)
        for t in range(6):
            opt.zero_grad()
            # each once: torch sums repeated rows of a dense gradient in another order
            tokens = torch.randperm(30, generator=torch.Generator().manual_seed(t))[:10]
            head(embedding(tokens)).square().sum().backward()
            assert embedding.weight.grad.is_sparse == sparse
            opt.step()
        tables.append([embedding.weight.detach(), *opt.state[embedding.weight].values(), *head.parameters()])
    assert all(map(same_bits, *tables))


@pytest.mark.parametrize("wrap", [danlu.EMA, danlu.Lookahead, lambda opt: danlu.GradientAccumulation(opt, 2)])
@every_mode
def test_wrappers_of_a_lazy_optimizer(wrap: Callable[[Any], Any], mode: str) -> None:
    p, q = (torch.nn.Parameter(values((6, 3), 0, wild=False)) for _ in range(2))
    alone = danlu.Lazy(danlu.AdamW([q], weight_decay=0.5), mode)
    opt = wrap(danlu.Lazy(danlu.AdamW([p], weight_decay=0.5), mode))
    accumulates = isinstance(opt, danlu.GradientAccumulation)
    for t in range(4):
        p.grad = dense((6, 3), t // 2 if accumulates else t, wild=False)
        q.grad = p.grad.clone()
        opt.step()
        if not accumulates or t % 2:
            alone.step()
    assert same_bits(p, q)


def own_rule() -> type[danlu.FusedOptimizer]:
    def reference(
        p: torch.Tensor, g: torch.Tensor, m: torch.Tensor, *, step: float, lr: float, decay: float
    ) -> torch.Tensor:
        m.mul_(0.5).add_(g)
        return m * lr + p * decay

    return danlu.custom(
        "Own",
        states=["exp_avg"],
        defaults={"lr": 0.1, "decay": 0.25},
        reference=reference,
        coefficients=lambda math, *, step, lr, decay: dict(lr=lr, decay=decay),
    )


@every_mode
def test_a_rule_of_ones_own(mode: str) -> None:
    p = torch.nn.Parameter(torch.ones(3, 2))
    opt = danlu.Lazy(own_rule()([p], lr=0.5), mode)
    p.grad = torch.ones(3, 2)
    opt.step()
    assert p[0].tolist() == [0.25, 0.25]
    p.grad = coo([1], torch.ones(1, 2), (3, 2))
    opt.step()
    assert p[:, 0].tolist() == [0.25, 0.25 - 0.75 - 0.0625, 0.25]
    assert opt.state[p]["exp_avg"][:, 0].tolist() == ([1.0, 1.5, 1.0] if mode == "rows" else [0.5, 1.5, 0.5])


def test_layer_adaptation_sees_the_whole_parameter(backend: str) -> None:
    """The step that it adapts is that of all rows; those without a gradient keep their parameters."""
    p, q = (torch.nn.Parameter(values((6, 3), 0, wild=False)) for _ in range(2))
    lazy = danlu.Lazy(danlu.LayerAdaptation(danlu.AdamW([p], weight_decay=0.1, backend=backend)), "params")
    usual = danlu.LayerAdaptation(danlu.AdamW([q], weight_decay=0.1, backend=backend))
    for t in range(4):
        p.grad = dense((6, 3), t, wild=False)
        q.grad = p.grad.clone()
        kept = p.detach().clone()
        lazy.step()
        usual.step()
        takes_part = p.grad.ne(0).any(1)
        torch.testing.assert_close(
            p.detach(), torch.where(takes_part[:, None], q, kept).detach(), rtol=1e-5, atol=0
        )
        with torch.no_grad():
            q.copy_(p)
    (row,) = lazy.backend_report()
    assert row.backend == "reference"
    assert backend == "reference" or "no kernel sums over a lazy parameter" in row.reason


@every_mode
def test_a_dense_gradient_may_lie_otherwise_in_the_next_step(mode: str, backend: str) -> None:
    """With other strides, or as a lazily negated view."""
    p, q = (torch.nn.Parameter(values((12, 5), 0, wild=False)) for _ in range(2))
    lazy = [danlu.Lazy(danlu.AdamW([x], backend=b), mode) for x, b in ((p, backend), (q, "reference"))]
    strided, negated = permuted(1, 0), lambda g: torch._neg_view(-g)
    for t, form in enumerate((torch.clone, strided, torch.clone, negated, torch.clone)):
        g = dense((12, 5), t, wild=False)
        p.grad, q.grad = form(g), g
        for opt in lazy:
            opt.step()
    assert same_bits(p, q)
    assert all(same_bits(lazy[0].state[p][name], value) for name, value in lazy[1].state[q].items())


@every_mode
def test_the_default_dtype_is_no_matter(mode: str, backend: str) -> None:
    shape = (3000, 6)
    results = []
    try:
        for dtype in (F32, BF16):
            torch.set_default_dtype(dtype)
            p = torch.nn.Parameter(values(shape, 0, wild=False).float())
            opt = danlu.Lazy(danlu.AdamW([p], backend=backend), mode)
            for t in range(3):
                p.grad = coo([5 * t], values((1, 6), t, wild=False).float(), shape)
                opt.step()
            results.append([p.detach(), *opt.state[p].values()])
    finally:
        torch.set_default_dtype(F32)
    assert all(map(same_bits, *results))


@every_mode
def test_lr_zero_changes_no_parameter(mode: str, backend: str) -> None:
    p = torch.nn.Parameter(values((6, 3), 0, wild=False))
    before = p.detach().clone()
    opt = danlu.Lazy(danlu.AdamW([p], lr=0.0, backend=backend), mode)
    p.grad = coo([2], torch.ones(1, 3), (6, 3))
    opt.step()
    assert same_bits(p, before)
    assert opt.state[p]["exp_avg"][2].all()


def test_a_step_counts_as_a_write() -> None:
    p = torch.nn.Parameter(torch.ones(4, 3))
    opt = danlu.Lazy(danlu.Lion([p]))
    p.grad = coo([2], torch.ones(1, 3), (4, 3))
    opt.step()
    version = p._version
    opt.step()
    assert p._version > version
