"""What only a GPU has: streams, graphs, its memory, GradScaler's tensors."""

from __future__ import annotations

import pytest
import torch
from steps import assert_waits_for_nothing, kernels

import danlu
from cases import BF16, CASES, Case, values
from danlu.testing import same_bits

every_case = pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
SHAPES = [(33, 65), (7,), (4096, 3), (), (0,), (16385,)]


def params_on(device: torch.device | str) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(values(s, i, wild=False).to(device)) for i, s in enumerate(SHAPES)]


def gradients(t: int, factor: float = 1.0) -> list[torch.Tensor]:
    return [values(s, 100 * t + i, wild=False) * factor for i, s in enumerate(SHAPES)]


def give(params: list[torch.nn.Parameter], t: int, factor: float = 1.0) -> None:
    """In place where there are gradients, as a captured graph needs."""
    for p, g in zip(params, gradients(t, factor), strict=True):
        if p.grad is None:
            p.grad = g.to(p.device)
        else:
            p.grad.copy_(g)


def assert_alike(got: danlu.FusedOptimizer, want: danlu.FusedOptimizer) -> None:
    for a, b in zip(got.param_groups, want.param_groups, strict=True):
        for p, q in zip(a["params"], b["params"], strict=True):
            assert same_bits(p.cpu(), q)
            for name, value in want.state[q].items():
                assert same_bits(got.state[p][name].cpu(), value), name


def test_one_launch_and_no_synchronization(backend: str, gpu: torch.device) -> None:
    """291 tensors in two groups."""
    params = [torch.nn.Parameter(torch.ones(64, device=gpu)) for _ in range(291)]
    for p in params:
        p.grad = torch.ones_like(p)
    opt = danlu.AdamW(
        [{"params": params[:100]}, {"params": params[100:], "weight_decay": 0.0}], backend=backend
    )
    assert {row.backend for row in opt.backend_report()} == {backend}
    (name,) = kernels(opt.step)
    assert "apply_kernel" in name
    assert_waits_for_nothing(opt.step)


def test_a_tensor_of_more_than_2_to_the_31_elements(backend: str, gpu: torch.device) -> None:
    """Against the same step over pieces of it."""
    size = 2**31 + 16384 + 5
    if torch.cuda.mem_get_info()[0] < 5 * 2 * size:
        pytest.skip("needs 22 GB of free memory")
    p = torch.nn.Parameter(torch.zeros(size, dtype=BF16, device=gpu))
    p.grad = torch.empty_like(p)
    generator = torch.Generator(gpu).manual_seed(0)
    pieces = [slice(at, min(at + 2**28, size)) for at in range(0, size, 2**28)]
    for piece in pieces:
        p.grad[piece].normal_(generator=generator)
    opt = danlu.Lion([p], lr=0.5, weight_decay=0.1, state_dtype=BF16, backend=backend)
    for _ in range(2):
        opt.step()
    for piece in pieces:
        q = torch.nn.Parameter(torch.zeros(piece.stop - piece.start, dtype=BF16, device=gpu))
        q.grad = p.grad[piece]
        other = danlu.Lion([q], lr=0.5, weight_decay=0.1, state_dtype=BF16, backend=backend)
        for _ in range(2):
            other.step()
        assert torch.equal(p[piece], q)
        assert torch.equal(opt.state[p]["exp_avg"][piece], other.state[q]["exp_avg"])
        assert q.count_nonzero() > 0


def test_the_current_stream_is_used(backend: str, gpu: torch.device) -> None:
    """The gradient is written on a side stream, late; a step on another one would not see it."""
    p = torch.nn.Parameter(torch.zeros(1 << 20, device=gpu))
    p.grad = torch.zeros_like(p)
    opt = danlu.Lion([p], lr=1.0, backend=backend)
    opt.step()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        p.grad.fill_(1.0)
        opt.step()
    torch.cuda.synchronize()
    assert bool((p == -1).all())


def test_a_device_that_is_not_the_current_one(gpu: torch.device) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    params = [torch.nn.Parameter(torch.zeros(5, device=f"cuda:{i}")) for i in (0, 1)]
    for p in params:
        p.grad = torch.ones_like(p)
    danlu.Lion(params, lr=1.0).step()
    assert all(bool((p == -1).all()) for p in params)
    assert torch.cuda.current_device() == 0


@every_case
def test_a_captured_graph(case: Case, backend: str, gpu: torch.device) -> None:
    """An lr changed in place between replays; nothing allocated; the bits of eager steps on the CPU."""
    lr = torch.tensor(case.hyper["lr"], device=gpu)
    rate = lr.item()  # in fp32
    params, plain_params = params_on(gpu), params_on("cpu")
    opt = case.make([{"params": params[:3]}, {"params": params[3:]}], lr=lr, capturable=True, backend=backend)
    plain = case.make([{"params": plain_params[:3]}, {"params": plain_params[3:]}], backend="cpu")

    def eager(t: int, rate: float) -> None:
        for group in plain.param_groups:
            group["lr"] = rate
        give(plain_params, t)
        plain.step()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for t in range(2):
            give(params, t)
            opt.step()
            eager(t, rate)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        opt.step()
    torch.cuda.synchronize()
    reserved = torch.cuda.memory_reserved()
    for t in range(2, 8):
        lr.fill_(case.hyper["lr"] / t)
        give(params, t)
        graph.replay()
        eager(t, lr.item())
        if t == 2:
            reserved = torch.cuda.memory_reserved()
    assert torch.cuda.memory_reserved() == reserved
    assert_alike(opt, plain)


def test_a_capture_with_host_coefficients_is_refused(gpu: torch.device) -> None:
    opt = danlu.AdamW(params_on(gpu))
    for p in opt.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    opt.step()
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="needs capturable=True"), torch.cuda.graph(graph):
        opt.step()
    torch.cuda.synchronize()


@every_case
def test_a_grad_scaler_waits_for_nothing(case: Case, backend: str, gpu: torch.device) -> None:
    """Infinities at one step: parameters, state and step stay as they were."""
    params, plain_params = params_on(gpu), params_on("cpu")
    opt = case.make(params, fused=True, backend=backend)
    plain = case.make(plain_params, backend="cpu")
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0, growth_interval=1000)
    scaler.scale(torch.zeros((), device=gpu))
    for t in range(6):
        scale = scaler.get_scale()
        give(params, t, scale)
        if t == 3:
            params[0].grad[0, 0] = float("inf")  # type: ignore[index]
        scaler.step(opt)
        scaler.update()
        if t != 3:
            give(plain_params, t)
            plain.step()
    assert scaler.get_scale() == 512.0
    assert_alike(opt, plain)


def test_steps_on_the_device_do_not_synchronize(backend: str, gpu: torch.device) -> None:
    params = params_on(gpu)
    lr = torch.tensor(1e-3, device=gpu)
    opt = danlu.AdamW(params, lr=lr, max_grad_norm=1.0, backend=backend)
    give(params, 0)
    on_host = danlu.AdamW(params_on(gpu), max_grad_norm=1.0, backend=backend)
    for p in on_host.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    # copies from pageable memory wait, and a first step sends its plan
    opt.step()
    on_host.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            opt.step()
            on_host.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert opt.counters_on_device
    assert not on_host.counters_on_device


def test_checkpoints_between_host_and_device(gpu: torch.device) -> None:
    """State saved by a capturable optimizer loads into one with counters on the host, and back."""
    params, others, third = params_on(gpu), params_on(gpu), params_on(gpu)
    a = danlu.AdamW(params, capturable=True)
    b, c = danlu.AdamW(others), danlu.AdamW(third, capturable=True)
    give(params, 0)
    a.step()
    for opt, source in ((b, a), (c, b)):
        opt.load_state_dict(source.state_dict())
        state = opt.state[opt.param_groups[0]["params"][0]]
        assert state["step"].item() == 1
        assert state["step"].is_cuda == opt.capturable
