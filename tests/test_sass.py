"""Machine code of 9.0, as ptxas makes it, gives the bits of the reference: executed in the place of a GPU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from cases import BF16, CASES, F16, F32, Case, Storage, set_gradient, values
from danlu.testing import same_bits
from emulated import Emulated
from machine_code import built
from machine_code.memory import RecentTensors
from machine_code.sass.launches import Executor

BY_ID = {case.id: case for case in CASES}
FULL, HALF, MIXED = Storage(F32, F32, F32), Storage(BF16, BF16, BF16), Storage(BF16, BF16, F32)
# elements, and elements by which a tensor is off 16 bytes
SIZES = [(1, 0), (7, 0), (2051, 0), (70, 1), (1100, 0), (33, 3)]


@pytest.fixture
def library() -> Path:
    return built.library()


@pytest.fixture
def tensors() -> Iterator[RecentTensors]:
    with RecentTensors() as found:
        yield found


@pytest.fixture
def execute(library: Path, tensors: RecentTensors, cuda: Emulated) -> Iterator[Executor]:
    yield Executor(tensors, cuda, library)
    cuda.native.reset()


def optimizer(
    case: Case, storage: Storage, sizes: Sequence[tuple[int, int]] = SIZES, **engine: object
) -> torch.optim.Optimizer:
    """In two groups, which have coefficients and signs of the gradient of their own."""
    params = [
        torch.nn.Parameter(values((n + off,), i).to(storage.param)[off:]) for i, (n, off) in enumerate(sizes)
    ]
    groups = [{"params": params[::2]}, {"params": params[1::2], "lr": 5e-3, "maximize": True}]
    return case.make(groups, state_dtype=storage.moment, **engine)


def parameters(opt: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [p for group in opt.param_groups for p in group["params"]]


def stepped(opt: torch.optim.Optimizer, storage: Storage, steps: int = 2) -> list[torch.Tensor]:
    """Parameters and states after steps with wild gradients."""
    for t in range(steps):
        for i, p in enumerate(parameters(opt)):
            set_gradient(p, values(p.shape, 100 * (t + 1) + i).to(storage.grad))
        opt.step()
    states = [opt.state[p][name] for p in parameters(opt) for name in opt.state_names]
    return [p.detach() for p in parameters(opt)] + states


@pytest.mark.parametrize(
    ("name", "storage"),
    built.every(("lion", "adamw", "adax"), (HALF, MIXED, Storage(F16, F32, F32))),
)
def test_same_bits(name: str, storage: Storage, execute: Executor) -> None:
    assert_same_bits(BY_ID[name], storage, execute)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_same_bits_of_every_rule(case: Case, execute: Executor) -> None:
    assert_same_bits(case, FULL, execute)


@pytest.mark.parametrize("seed", [1, 2])
def test_same_bits_whatever_is_left_open(seed: int, execute: Executor) -> None:
    """Garbage in registers, approximations of reciprocals, which divisions take the slow way."""
    execute.seed = seed
    assert_same_bits(BY_ID["adamw"], FULL, execute)


def assert_same_bits(case: Case, storage: Storage, execute: Executor) -> None:
    got = stepped(optimizer(case, storage, backend="cuda"), storage)
    assert len(execute.names) == 2
    want = stepped(optimizer(case, storage, backend="reference"), storage)
    assert all(map(same_bits, got, want))


@pytest.mark.parametrize("found_inf", [0.0, 1.0])
@pytest.mark.parametrize("name", ["lion", "adamw"])
def test_coefficients_from_the_device(name: str, found_inf: float, execute: Executor) -> None:
    """And gradients that a GradScaler scaled."""
    results = []
    for backend in ("cuda", "cpu"):
        opt = optimizer(BY_ID[name], FULL, SIZES[:4], backend=backend, capturable=True)
        opt.grad_scale, opt.found_inf = torch.tensor(1024.0), torch.tensor(found_inf)
        results.append(stepped(opt, FULL, 1))
    assert all(map(same_bits, *results))
    assert same_bits(results[0][0], values((1,), 0)) == bool(found_inf)


@pytest.mark.parametrize("name", ["lion", "adamw"])
def test_a_full_launch(name: str, execute: Executor) -> None:
    """Tensors and coefficients until no more fit: the first row ends where the parameters end."""
    results = []
    for backend in ("cuda", "reference"):
        params = [torch.nn.Parameter(values((1,), i)) for i in range(550)]
        groups = [{"params": [p], "lr": 1e-3 * (1 + i)} for i, p in enumerate(params)]
        results.append(stepped(BY_ID[name].make(groups, backend=backend), FULL, 1))
    assert execute.machines[0].launch.blocks >= 380
    assert len(execute.names) == 2
    assert all(map(same_bits, *results))


@pytest.mark.parametrize("name", ["lion", "adamw"])
def test_chunks_of_a_tensor(name: str, execute: Executor) -> None:
    """The last block of a tensor and what lies around it."""
    sizes = [(2 * 16384 + 1030, 0), (5, 0), (16384 + 9, 1)]
    results = []
    for backend in ("cuda", "reference"):
        execute.blocks = [2, 4, 5]
        opt = optimizer(BY_ID[name], FULL, sizes, backend=backend)
        p, other, small = parameters(opt)  # as they lie in the launch
        stepped(opt, FULL, 1)
        results.append([p[2 * 16384 :], other[16384:], small])
        if backend == "cuda":
            assert same_bits(p[: 2 * 16384], values((sizes[0][0],), 0)[: 2 * 16384])
    assert all(map(same_bits, *results))
