"""One optimizer in the hands of several threads, and several optimizers at once."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

import danlu
from danlu.backends.native import NativeExecutor
from emulated import Emulated
from training import some_params, train


def test_threads_that_step_at_once(cuda: Emulated) -> None:
    """In a process of its own, which says what it does."""
    script = Path(__file__).with_name("threads.py")
    run = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout[-200:] + run.stderr[-2000:]


@pytest.mark.parametrize("backend", ["cpu", "cuda"])
def test_a_state_replaced_while_a_step_looks(
    cuda: Emulated, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch lets other threads run while the native list reads tensors; here a copied gradient does."""
    params = [torch.nn.Parameter(torch.randn(40, 50)) for _ in range(3)]
    opt = danlu.Lion(params, lr=0.1, backend=backend)
    for p in params:
        p.grad = torch.ones_like(p)
    opt.step()
    before = [opt.state[p]["exp_avg"].clone() for p in params]
    old = [weakref.ref(opt.state[p]["exp_avg"]) for p in params]
    params[1].grad = torch.ones(50, 40).t()  # has to be copied
    copy_gradient, alive = NativeExecutor._copy_gradient, []

    def replacing(self: NativeExecutor, index: int) -> torch.Tensor | None:
        if not alive:
            for p in params:
                opt.state[p]["exp_avg"] = opt.state[p]["exp_avg"].clone()
            alive.extend(tensor() is not None for tensor in old)
        return copy_gradient(self, index)

    monkeypatch.setattr(NativeExecutor, "_copy_gradient", replacing)
    opt.step()
    # what the list has read is held until it gives up; what it has not read it never touches
    assert alive == [True, True, False]
    for p, was in zip(params, before, strict=True):
        assert_close(opt.state[p]["exp_avg"], was * 0.99 + 0.01)


def test_states_that_never_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    p = torch.nn.Parameter(torch.ones(4, 5))
    opt = danlu.Lion([p], backend="cpu")
    p.grad = torch.ones(5, 4).t()

    def replacing(self: NativeExecutor, index: int) -> None:
        opt.state[p]["exp_avg"] = opt.state[p]["exp_avg"].clone()

    monkeypatch.setattr(NativeExecutor, "_copy_gradient", replacing)
    with pytest.raises(RuntimeError, match="does another thread replace them"):
        opt.step()
    assert torch.equal(p, torch.ones(4, 5))


def test_a_copy_has_a_lock_of_its_own() -> None:
    opt = danlu.AdamW(some_params(), backend="reference")
    train(opt, range(1))
    for other in (copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
        assert other._lock is not opt._lock
        with opt._lock:
            worker = threading.Thread(target=train, args=(other, range(1)))
            worker.start()
            worker.join(timeout=60)
            assert not worker.is_alive()


def test_what_is_around_an_optimizer_has_its_lock() -> None:
    inner = danlu.Lion(some_params())
    for outer in (danlu.Lazy(inner), copy.deepcopy(danlu.LayerAdaptation(inner))):
        assert outer._lock is outer.optimizer._lock
    proxy = object.__new__(danlu.Lion)  # as frameworks do
    proxy.__dict__ = dict(inner.__dict__)
    assert proxy._lock is inner._lock


def test_a_step_that_fails_and_a_closure_hold_no_lock() -> None:
    opt = danlu.AdamW(some_params())
    opt.param_groups[0]["params"][0].grad = torch.ones(4, 1).to_sparse()
    with pytest.raises((TypeError, ValueError)):
        opt.step()
    opt.zero_grad()

    def closure() -> float:
        worker = threading.Thread(target=train, args=(opt, range(1)))
        worker.start()
        worker.join(timeout=60)
        assert not worker.is_alive()
        return 1.0

    assert opt.step(closure) == 1.0


def test_threads_in_a_wrapper() -> None:
    """No call is lost between counting and stepping."""
    model = [torch.nn.Parameter(torch.zeros(2000)) for _ in range(20)]
    opt = danlu.GradientAccumulation(danlu.EMA(danlu.Lookahead(torch.optim.SGD(model, lr=1.0), k=2)), 3)
    for p in model:
        p.grad = torch.ones_like(p)
    errors: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(60):
                opt.step()
                opt.state_dict()
        except BaseException as error:
            errors.append(error)

    workers = [threading.Thread(target=work) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=120)
    assert not errors
    assert opt.position == 0
    assert {opt.state[p]["ema_step"].item() for p in model} == {60.0}
    assert {opt.state[p]["slow_step"].item() for p in model} == {30.0}
    # of two steps of 1 the slow weights take one
    assert all(torch.equal(p, torch.full_like(p, -30.0)) for p in model)


def test_a_wrapper_has_the_lock_of_what_is_inside() -> None:
    """Two could be taken in either order, by a hook say, and never be given back."""
    inner = danlu.AdamW(some_params())
    opt = danlu.GradientAccumulation(danlu.EMA(danlu.Lazy(inner)), 2)
    assert opt._shared.lock is inner._lock
    other = copy.deepcopy(opt)
    assert other._shared.lock is not inner._lock
    around = danlu.EMA(torch.optim.SGD(some_params(), lr=0.1))
    assert danlu.GradientAccumulation(around, 2)._shared.lock is around._shared.lock


@pytest.mark.parametrize("kind", [danlu.AdamW, torch.optim.SGD])
def test_a_closure_runs_without_the_lock_of_a_wrapper(kind: type[torch.optim.Optimizer]) -> None:
    opt = danlu.EMA(kind(some_params(), lr=0.1))  # type: ignore[call-arg]

    def closure() -> float:
        worker = threading.Thread(target=opt.state_dict)
        worker.start()
        worker.join(timeout=60)
        assert not worker.is_alive()
        return 1.0

    assert opt.step(closure) == 1.0


def test_swap_waits_for_a_step() -> None:
    """Which would be lost when the weights come back."""
    p = torch.nn.Parameter(torch.zeros(2))
    opt = danlu.EMA(torch.optim.SGD([p], lr=1.0), decay=0.5)
    p.grad = torch.ones(2)
    opt.step()
    swap = opt.swap()
    worker = threading.Thread(target=swap.__enter__, daemon=True)

    def enter(*_: object) -> None:
        worker.start()
        worker.join(timeout=0.5)
        assert worker.is_alive()

    opt.optimizer.register_step_pre_hook(enter)
    opt.step()
    worker.join(timeout=60)
    swap.__exit__(None, None, None)
    assert p.tolist() == [-2.0, -2.0]
