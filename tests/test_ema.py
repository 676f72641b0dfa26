"""The average of the weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

import danlu
from cases import BF16, values
from oracles.itself import normwise
from oracles.jax_optimizers import Run, trajectories
from training import all_same, copies, everything, parameters, some_params, train
from wrapped import MAKERS


def averages(opt: danlu.EMA) -> list[torch.Tensor]:
    with opt.swap():
        return [p.detach().clone() for p in parameters(opt)]


@pytest.mark.parametrize("name", MAKERS)
def test_the_formula(name: str) -> None:
    """In float64, around everything: a weighted mean of the parameters after each step."""
    params = [torch.nn.Parameter(p.detach().double()) for p in some_params()]
    opt = danlu.EMA(MAKERS[name](params), decay=0.7)
    history = []
    for t in range(6):
        for i, p in enumerate(params):
            p.grad = values(p.shape, 100 * t + i, wild=False).double()
        opt.step()
        history.append([p.detach().clone() for p in params])
        weights = [0.7 ** (t - s) for s in range(t + 1)]
        for i, got in enumerate(averages(opt)):
            want = sum(w * past[i] for w, past in zip(weights, history, strict=True)) / sum(weights)
            assert normwise(got, want) < 1e-14, t  # type: ignore[arg-type]
        assert all(torch.equal(p, q) for p, q in zip(params, history[-1], strict=True))


def test_as_optax_has_it(tmp_path: Path) -> None:
    start, gradients = values((20,), 0, wild=False).double(), values((10, 20), 1, wild=False).double()
    p = torch.nn.Parameter(start.clone())
    opt = danlu.EMA(danlu.Adam([p], lr=0.1), decay=0.9)
    (theirs,) = trajectories(
        tmp_path, [Run("averaged_adam", start.numpy(), gradients.numpy(), [0.1] * 10, dict(decay=0.9))]
    )
    for g in gradients:
        p.grad = g.clone()
        opt.step()
    assert (averages(opt)[0] - torch.from_numpy(theirs["mean"])).abs().max() < 1e-14


def test_swap_puts_everything_back() -> None:
    """Also when the evaluation raises."""
    opt, plain = danlu.EMA(danlu.AdamW(some_params(), lr=0.1)), danlu.AdamW(some_params(), lr=0.1)
    for t in range(3):
        train(opt, [t])
        train(plain, [t])
        with opt.swap():
            assert t == 0 or not torch.equal(parameters(opt)[0], parameters(plain)[0])
            with pytest.raises(RuntimeError, match="averages are in place, a step would train them"):
                opt.step()
            with pytest.raises(RuntimeError, match="in place already"), opt.swap():
                pass
        with pytest.raises(ZeroDivisionError), opt.swap():
            raise ZeroDivisionError
    assert all_same(everything(opt), everything(plain))


def test_no_average_before_the_first_step() -> None:
    opt = danlu.EMA(danlu.AdamW(some_params()))
    with pytest.raises(RuntimeError, match="no average before the first step"), opt.swap():
        pass


def test_state_that_a_checkpoint_asks_for_is_no_average() -> None:
    model = torch.nn.ParameterList(some_params())
    opt = danlu.EMA(danlu.AdamW(model.parameters()))
    before = copies(opt)
    get_optimizer_state_dict(model, opt)
    with pytest.raises(RuntimeError, match="no average before the first step"), opt.swap():
        pass
    opt.eval()
    assert all_same(list(parameters(opt)), before)


def test_a_parameter_that_joins_late() -> None:
    """Its average counts the steps since."""
    opt = danlu.EMA(torch.optim.SGD(some_params(1), lr=0.0), decay=0.5)
    train(opt, range(3))
    opt.add_param_group({"params": [torch.nn.Parameter(torch.full((2,), 3.0))]})
    train(opt, range(1))
    assert torch.equal(averages(opt)[1], torch.full((2,), 3.0))


def test_a_parameter_without_a_gradient_is_averaged() -> None:
    """It may be changed by others."""
    opt = danlu.EMA(torch.optim.SGD(some_params(2), lr=0.1), decay=0.5)
    still = parameters(opt)[1]
    for value in (1.0, 4.0):
        train(opt, range(1))
        still.data.fill_(value)
        still.grad = None
        opt.step()
    start = some_params(2)[1]
    assert not torch.equal(start, still)
    for value in (4.0, 4.0, 4.0, 7.0):
        still.data.fill_(value)
        opt.step()
    # seven eighths of what is more than three steps old are gone
    assert (averages(opt)[1] - 5.5).abs().max() < 0.25


def test_averages_of_bf16_parameters_are_fp32() -> None:
    """In bf16 an average would stop: 0.001 of a step is less than half of its spacing."""
    p = torch.nn.Parameter(torch.zeros(4, dtype=BF16))
    opt = danlu.EMA(torch.optim.SGD([p], lr=1.0), decay=0.999)
    p.grad = torch.zeros_like(p)
    for _ in range(100):
        opt.step()
    p.data.fill_(1.0)
    for _ in range(100):
        opt.step()
    ema = opt.state_dict()["state"][0]["ema"]
    assert ema.dtype == torch.float32
    assert ema[0].item() == pytest.approx((1 - 0.999**100) / (1 - 0.999**200), rel=1e-5)


@pytest.mark.parametrize("backend", ["cpu", "reference", "cuda"])
@pytest.mark.parametrize("decay", [0.999, 0.99999])
def test_weights_that_never_move(backend: str, decay: float, cuda: object) -> None:
    """Are their own average, to the bit, however long."""
    p = torch.nn.Parameter(values((33,), 0, wild=False))
    opt = danlu.EMA(danlu.Lion([p], lr=0.0, backend=backend), decay=decay)
    p.grad = torch.zeros_like(p)
    for _ in range(200):
        opt.step()
    opt._pass.state[p]["step"].fill_(60_000.0)
    opt.step()
    assert torch.equal(averages(opt)[0], p)


@pytest.mark.parametrize(("before", "after"), [(0.9, 0.999), (0.999, 0.9), (0.9, 0.0), (0.0, 0.9)])
def test_resumed_with_another_decay(before: float, after: float) -> None:
    """Each step counts with the decay that it was averaged with."""
    params = [torch.nn.Parameter(p.detach().double()) for p in some_params()]
    opt = danlu.EMA(danlu.AdamW(params, lr=0.1), decay=before)
    history: list[tuple[float, list[torch.Tensor]]] = []

    def go(steps: int, decay: float) -> None:
        for t in range(steps):
            for i, p in enumerate(params):
                p.grad = values(p.shape, 100 * t + i, wild=False).double()
            opt.step()
            history.append((decay, [p.detach().clone() for p in params]))

    go(7, before)
    loaded = danlu.EMA(danlu.AdamW(params, lr=0.1), decay=after)
    loaded.load_state_dict(opt.state_dict())
    opt = loaded
    for steps in (0, 5):
        go(steps, after)
        want, total = [torch.zeros_like(p) for p in params], 0.0
        for decay, weights in history:
            want = [decay * e + (1 - decay) * p for e, p in zip(want, weights, strict=True)]
            total = decay * total + (1 - decay)
        for got, e in zip(averages(opt), want, strict=True):
            assert normwise(got, e / total) < 1e-6  # the number of steps is fp32
    assert opt.param_groups[0]["ema_decay"] == after


def test_an_average_of_ones_is_one_whatever_the_decay() -> None:
    p = torch.nn.Parameter(torch.ones(3))
    opt = danlu.EMA(torch.optim.SGD([p], lr=0.0), decay=0.9)
    for decay in (0.999, 0.9, 0.5):
        train(opt, range(20))
        loaded = danlu.EMA(torch.optim.SGD([p], lr=0.0), decay=decay)
        loaded.load_state_dict(opt.state_dict())
        opt = loaded
        assert averages(opt)[0].tolist() == [1.0] * 3


def test_a_hook_that_raises_after_the_step_loses_no_average() -> None:
    opt, plain = (danlu.EMA(danlu.AdamW(some_params(), lr=0.1), decay=0.5) for _ in range(2))

    def fail(*_: object) -> None:
        raise ZeroDivisionError

    train(plain, range(3))
    train(opt, range(1))
    handle = opt.optimizer.register_step_post_hook(fail)
    with pytest.raises(ZeroDivisionError):
        train(opt, range(1, 2))
    handle.remove()
    train(opt, range(2, 3))
    assert all_same(everything(opt), everything(plain))
    assert all_same(averages(opt), averages(plain))
