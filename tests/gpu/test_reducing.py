"""Rules that reduce and the norm of all gradients, on a GPU: close to float64, the same bits always, in few
launches that wait for nothing.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from steps import assert_waits_for_nothing, kernels

import danlu
from cases import (
    BF16,
    EVERY_REDUCING,
    F16,
    F32,
    OTHER_LAYERED,
    REDUCING,
    STORAGES,
    Case,
    Storage,
    set_gradient,
    values,
)
from danlu.backends.gpu import GpuExecutor
from layouts import LAYOUTS, Layout
from reductions import CASE, DOUBLE, LAST_BIT, MATRICES, TOLERANCE, assert_bits, difference, far, singles
from runs import Result, run
from training import all_same, copies, everything, give_gradients, parameters

# an emulated device takes its time: several tiles, tiles of one warp, narrow rows
FEW = [layout for layout in MATRICES if layout.id in ("few-rows-4", "batch", "many-small", "lanes-8")]
VECTORS = [layout for layout in LAYOUTS if layout.native]
COMPILED = [s for s in STORAGES if s.moment != F16]
# Triton compiles each rule for each combination of dtypes anew: of 16 bits one rule of each kind of sum
KINDS = ["adafactor-momentum", "lamb", "tiger-rows", "amos-momentum"]
TRITON_STORAGES = [Storage(BF16, BF16, BF16), Storage(F16, F16, F32)]
LR_STEPS = 4
by_case = functools.partial(pytest.mark.parametrize, "case", ids=lambda c: c.id)
every_case, listed_case = by_case(EVERY_REDUCING + OTHER_LAYERED), by_case(REDUCING)


def places(case: Case, device_type: str, backend: str) -> list[Layout]:
    """Matrices; vectors and any layout too, where the case takes them."""
    others = [one for one in VECTORS if device_type == "cuda" or math.prod(one.shape) < 10_000]
    found = [*(MATRICES if device_type == "cuda" else FEW), *(others if case in REDUCING else [])]
    return [one for one in found if backend == "cuda" or of_few_widths(one)]


def of_few_widths(layout: Layout) -> bool:
    """Of the narrowest tiles and the widest: Triton compiles `reduce_gradient` for each width."""
    return len(layout.shape) < 2 or not 8 < layout.shape[-1] < 200


def at_once(case: Case, device: torch.device) -> list[torch.Tensor]:
    """Numbers in matrices of many blocks, some of them in vectors."""
    shapes: list[tuple[int, ...]] = [(70, 300), (3, 50, 210), (600, 7)]
    if device.type == "cuda":
        shapes += [(2048, 3000), (20_000, 210), (200, 9000)]
    if case in REDUCING:
        shapes += [(16_385,), (5,)]
    generator = torch.Generator(device).manual_seed(0)
    return [torch.randn(shape, generator=generator, device=device) for shape in shapes]


def trained(
    case: Case, starts: Sequence[torch.Tensor], steps: int, **engine: Any
) -> tuple[danlu.FusedOptimizer, list[torch.Tensor]]:
    """An optimizer over copies, and parameters and states after some steps."""
    opt = case.make([torch.nn.Parameter(start.clone()) for start in starts], **engine)
    for t in range(steps):
        for p, start in zip(parameters(opt), starts, strict=True):
            p.grad = start.roll(t + 1)
        opt.step()
    return opt, everything(opt)


@functools.cache
def expected(case_id: str, storage: Storage, by: str, steps: int, layouts: tuple[Layout, ...]) -> Result:
    return run(CASE[case_id], storage, by, wild=False, steps=steps, layouts=layouts)


@every_case
def test_close_to_float64_and_to_the_cpu(case: Case, backend: str, device: torch.device) -> None:
    layouts = places(case, device.type, backend)
    got = run(case, STORAGES[0], backend, device=device, wild=False, steps=4, layouts=layouts)
    assert not far(got, expected(case.id, DOUBLE, "reference", 4, tuple(layouts)), layouts)
    by_cpu = expected(case.id, STORAGES[0], "cpu", 4, tuple(layouts))
    for layout, state, other in zip(layouts, got, by_cpu, strict=True):
        assert all(case.agrees(state[key].cpu(), other[key]) for key in other), layout.id


@every_case
def test_kernels_take_everything(case: Case, backend: str, device: torch.device) -> None:
    opt = case.make([torch.nn.Parameter(x) for x in at_once(case, device)], backend=backend)
    assert {row.backend for row in opt.backend_report()} == {backend}


@pytest.mark.parametrize(
    ("backend", "case", "storage"),
    [("cuda", case, storage) for case in EVERY_REDUCING + OTHER_LAYERED for storage in COMPILED[1:]]
    + [("triton", CASE[kind], storage) for kind in KINDS for storage in TRITON_STORAGES],
    indirect=["backend"],
    ids=lambda x: x if isinstance(x, str) else x.id,
)
def test_16_bits(case: Case, storage: Storage, backend: str, device: torch.device) -> None:
    """One step from the same numbers: what is stored differs by the last bit of 16 at most."""
    layouts = [one for one in places(case, device.type, backend) if one in MATRICES]
    got = run(case, storage, backend, device=device, wild=False, steps=1, layouts=layouts)
    want = expected(case.id, storage, "reference", 1, tuple(layouts))
    assert not far(got, want, layouts, LAST_BIT)
    assert not far(singles(got), singles(want), layouts)


@listed_case
def test_cuda_and_triton_agree(case: Case, gpu: torch.device) -> None:
    layouts = places(case, gpu.type, "triton")
    a, b = (
        run(case, STORAGES[0], backend, device=gpu, wild=False, steps=4, layouts=layouts)
        for backend in ("cuda", "triton")
    )
    assert not far(a, b, layouts)


@every_case
def test_the_same_bits_from_run_to_run(case: Case, backend: str, device: torch.device) -> None:
    starts = at_once(case, device)
    _, first = trained(case, starts, 2, backend=backend)
    for _ in range(9 if device.type == "cuda" else 1):
        assert all_same(trained(case, starts, 2, backend=backend)[1], first)


@every_case
def test_coefficients_from_the_device(case: Case, backend: str, device: torch.device) -> None:
    """The same bits as with coefficients from the host."""
    layouts = places(case, device.type, backend)
    host, on_device = (
        run(
            case,
            STORAGES[0],
            backend,
            device=device,
            wild=False,
            steps=3,
            layouts=layouts,
            capturable=capturable,
        )
        for capturable in (False, True)
    )
    assert_bits(
        [{key: x.cpu() for key, x in state.items()} for state in on_device],
        [{key: x.cpu() for key, x in state.items()} for state in host],
        layouts,
    )


@every_case
def test_found_inf_touches_nothing(case: Case, backend: str, device: torch.device) -> None:
    opt, _ = trained(case, at_once(case, device), 1, backend=backend, capturable=True)
    before = copies(opt)
    for found, stays in ((1.0, True), (0.0, False)):
        opt.found_inf = torch.tensor([found], device=device)  # type: ignore[attr-defined]
        opt.step()
        assert all_same(everything(opt), before) == stays


@listed_case
def test_a_captured_graph(case: Case, backend: str, gpu: torch.device) -> None:
    """An lr changed in place between replays; nothing allocated; the bits of eager steps."""
    starts = at_once(case, gpu)
    lr = torch.tensor(case.hyper["lr"], device=gpu)
    options = dict(backend=backend, max_grad_norm=1.0)
    opt = case.make([torch.nn.Parameter(x.clone()) for x in starts], lr=lr, capturable=True, **options)
    plain = case.make([torch.nn.Parameter(x.clone()) for x in starts], lr=lr.item(), **options)
    for p in (*parameters(opt), *parameters(plain)):
        p.grad = torch.empty_like(p)

    def give(t: int) -> None:
        for start, p, q in zip(starts, parameters(opt), parameters(plain), strict=True):
            for x in (p, q):
                x.grad.copy_(start.roll(t + 1))  # type: ignore[union-attr]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for t in range(2):
            give(t)
            opt.step()
            plain.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        opt.step()
    torch.cuda.synchronize()
    for t in range(2, 2 + LR_STEPS):
        lr.fill_(case.hyper["lr"] / t)
        plain.param_groups[0]["lr"] = lr.item()
        give(t)
        held = torch.cuda.memory_allocated()
        graph.replay()
        assert torch.cuda.memory_allocated() == held
        plain.step()
    assert all_same([x.cpu() for x in everything(opt)], [x.cpu() for x in everything(plain)])


@listed_case
def test_a_step_waits_for_nothing_and_allocates_nothing(case: Case, backend: str, gpu: torch.device) -> None:
    opt, _ = trained(case, at_once(case, gpu), 3, backend=backend, max_grad_norm=1.0)
    assert_waits_for_nothing(opt.step)


def test_launches(backend: str, gpu: torch.device) -> None:
    """LAMB takes three for any number of tensors and groups, the norm of their gradients two more."""
    params = [torch.nn.Parameter(torch.ones(1 + i % 3, 5, device=gpu)) for i in range(600)]
    for p in params:
        p.grad = torch.ones_like(p)
    groups: list[dict[str, Any]] = [{"params": params[::2]}, {"params": params[1::2], "weight_decay": 0.0}]
    counts = [
        len(kernels(danlu.LAMB(groups, backend=backend, max_grad_norm=norm).step)) for norm in (None, 1.0)
    ]
    assert counts[0] <= 3
    assert counts[1] <= counts[0] + 2


@listed_case
def test_a_grad_scaler_with_infinities(case: Case, backend: str, gpu: torch.device) -> None:
    """Its step changes nothing; the others have the bits of steps without a scaler."""
    starts = at_once(case, gpu)
    opt = case.make([torch.nn.Parameter(x.clone()) for x in starts], fused=True, backend=backend)
    plain = case.make([torch.nn.Parameter(x.clone()) for x in starts], backend=backend)
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0, growth_interval=1000)
    scaler.scale(torch.zeros((), device=gpu))
    for t in range(4):
        for p, q, start in zip(parameters(opt), parameters(plain), starts, strict=True):
            q.grad = start.roll(t + 1)
            p.grad = q.grad * scaler.get_scale()
        if t == 2:
            parameters(opt)[0].grad[0, 0] = float("inf")  # type: ignore[index]
            before = copies(opt)
        scaler.step(opt)
        scaler.update()
        if t == 2:
            assert all_same(everything(opt), before)
        else:
            plain.step()
    assert scaler.get_scale() == 512.0
    assert all_same([x.cpu() for x in everything(opt)], [x.cpu() for x in everything(plain)])


@pytest.mark.parametrize("max_norm", [0.3, 1e6])
def test_the_norm_of_all_gradients(max_norm: float, backend: str, device: torch.device) -> None:
    """Of several dtypes, sizes and alignments; and the factor that clips by it."""
    gradients = [
        layout.grad(values(layout.shape, i, wild=False).to(device)) for i, layout in enumerate(VECTORS)
    ]
    gradients += [
        values((300, 70), 1, wild=False).to(device, BF16),
        values((5,), 2, wild=False).to(device, F16),
    ]
    params = [torch.nn.Parameter(torch.zeros_like(g)) for g in gradients]
    for p, g in zip(params, gradients, strict=True):
        set_gradient(p, g)
    opt = danlu.LAMB(params, backend=backend, max_grad_norm=max_norm)
    opt.step()
    squares = math.fsum(g.double().square().sum().item() for g in gradients)
    assert opt._plan is not None
    (executor,) = opt._plan._executors
    assert isinstance(executor, GpuExecutor)
    assert executor._norm[0].item() == pytest.approx(squares, rel=1e-12)
    factor = 1 / max(1.0, math.sqrt(squares) / max_norm)
    assert executor._norm.view(F32)[2].item() == pytest.approx(factor, rel=1e-7)


@by_case([CASE["adafactor-momentum"], CASE["lamb"], CASE["amos"]])
def test_the_current_stream_is_used(case: Case, backend: str, gpu: torch.device) -> None:
    """The gradient is written on a side stream, late; a pass on another one would not see it."""
    starts = at_once(case, gpu)
    (opt, _), (other, _) = (trained(case, starts, 1, backend=backend, max_grad_norm=1.0) for _ in range(2))
    give_gradients(parameters(other), 1)
    wanted = [p.grad.to(gpu) for p in parameters(other) if p.grad is not None]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        for p, g in zip(parameters(opt), wanted, strict=True):
            p.grad.copy_(g)  # type: ignore[union-attr]
        opt.step()
    torch.cuda.synchronize()
    for p, g in zip(parameters(other), wanted, strict=True):
        p.grad = g
    other.step()
    assert all_same(everything(opt), everything(other))


@pytest.mark.parametrize("rows", [41, 8200])
def test_a_matrix_of_more_than_2_to_the_31_elements(rows: int, backend: str, device: torch.device) -> None:
    """Its rows are repeated: averages and steps are those of one repetition. And a small one like it."""
    columns, times = (32_768, 8) if rows > 1000 else (300, 8)
    if rows > 1000:
        if device.type == "cpu":
            pytest.skip("needs a GPU")
        assert rows * columns * times > 2**31
        if torch.cuda.mem_get_info()[0] < 8 * rows * columns * times:
            pytest.skip("needs 17 GB of free memory")
    generator = torch.Generator(device).manual_seed(0)
    gradient = torch.randn(rows, columns, generator=generator, device=device, dtype=BF16)
    start = 0.1 * gradient
    small, large = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.repeat(times, 1))
    small.grad, large.grad = gradient, gradient.repeat(times, 1)
    opts = [danlu.Adafactor([p], preset="torch", lr=0.1, backend=backend) for p in (small, large)]
    for _ in range(2):
        for opt in opts:
            opt.step()
    want, got = (opt.state[p] for opt, p in zip(opts, (small, large), strict=True))
    assert difference(got["col_var"], want["col_var"]) < TOLERANCE
    for i in range(times):
        piece = slice(i * rows, (i + 1) * rows)
        assert difference(got["row_var"][piece], want["row_var"]) < TOLERANCE
        assert (large[piece] != small).float().mean().item() < 1e-3
    assert (small != start).float().mean().item() > 0.9
