"""On a GPU the CUDA and Triton kernels give the bits of the CPU kernels, which are the reference's."""

from __future__ import annotations

import functools

import pytest
import torch

import danlu
from cases import BF16, CASES, F16, F32, STORAGES, Case, Storage, set_gradient, values
from danlu.testing import same_bits
from layouts import LAYOUTS
from runs import Result, assert_same, run

COMPILED = [s for s in STORAGES if s.moment != F16]
NATIVE = [layout for layout in LAYOUTS if layout.native]
STEPS = 5
every_case = pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
every_storage = pytest.mark.parametrize("storage", COMPILED, ids=lambda s: s.id)


@functools.cache
def expected(case_id: str, storage: Storage, wild: bool) -> Result:
    case = next(c for c in CASES if c.id == case_id)
    return run(case, storage, "cpu", wild=wild, steps=STEPS, layouts=NATIVE)


@pytest.mark.parametrize("wild", [True, False], ids=["wild", "ordinary"])
@every_storage
@every_case
def test_same_bits(case: Case, storage: Storage, wild: bool, backend: str, device: torch.device) -> None:
    """Over layouts, alignments, tails, two groups; with subnormals, infinities and NaN, and without."""
    got = run(case, storage, backend, device=device, wild=wild, steps=STEPS, layouts=NATIVE)
    assert_same(got, expected(case.id, storage, wild), NATIVE)


@every_case
def test_same_bits_with_coefficients_from_the_device(case: Case, backend: str, device: torch.device) -> None:
    options = dict(device=device, wild=True, steps=STEPS, layouts=NATIVE, capturable=True)
    got = run(case, COMPILED[0], backend, **options)  # type: ignore[arg-type]
    assert_same(got, expected(case.id, COMPILED[0], True), NATIVE)


@every_case
def test_coefficients_of_two_million_steps(case: Case, device: torch.device) -> None:
    """The device's pow and expm1 may round their float64 otherwise, which may move the last bit of fp32."""
    opt = case.make([torch.nn.Parameter(torch.zeros(1))], backend="reference")
    (group,) = opt.param_groups
    steps = sorted({*range(1, 300), *(int(1.01**k) for k in range(300, 1459))})
    on_device = opt.fold(
        group,
        torch.tensor(steps, dtype=torch.float64, device=device),
        torch.zeros(len(steps), dtype=torch.float64, device=device),
        device,
    )
    for i, step in enumerate(steps):
        for name, number in opt.fold(group, float(step), 0.0).items():
            value = on_device[name]
            if isinstance(value, torch.Tensor):
                on_device[name] = value = value.expand(len(steps)).cpu()
                value = value[i].item()
            a, b = torch.tensor([number, value], dtype=F32).unbind()
            assert torch.nextafter(a, b) == b, (name, step)


@every_case
def test_any_bit_patterns(case: Case, backend: str, device: torch.device) -> None:
    """Every exponent in every array: the slow paths of division and square root, too."""
    elements = 1 << (16 if device.type == "cpu" else 24)  # a CPU emulates them
    generator = torch.Generator().manual_seed(0)

    def bits() -> torch.Tensor:
        high = torch.randint(-(2**31), 2**31, (elements,), generator=generator, dtype=torch.int64)
        return high.to(torch.int32).view(F32)

    start, gradient, moment, square = bits(), bits(), bits(), bits().abs()
    results = []
    for kernels, where in ((backend, device), ("cpu", torch.device("cpu"))):
        p = torch.nn.Parameter(start.to(where, copy=True))
        p.grad = gradient.to(where)
        opt = case.make([p], backend=kernels)
        opt.state[p] = {"step": torch.tensor(3.0), "exp_avg": moment.to(where, copy=True)}
        if "exp_avg_sq" in opt.state_names:
            opt.state[p]["exp_avg_sq"] = square.to(where, copy=True)
        if opt.accumulation_steps(opt.param_groups[0]) > 1:
            opt.state[p]["micro_step"] = torch.tensor(2.0)
        opt.step()
        results.append([p.detach(), *(opt.state[p][name] for name in opt.state_names)])
    for got, want in zip(*results, strict=True):
        assert same_bits(got, want.to(device))


def test_rounding_to_bf16(backend: str, device: torch.device) -> None:
    """m = 0 * m + 1 * g, stored: every 16th fp32 number, against torch's own rounding on the CPU."""
    parts = 64 if device.type == "cuda" else 1
    count = (1 << 28) // 64 if device.type == "cuda" else 1 << 16
    for part in range(parts):
        numbers = torch.arange(part * count, (part + 1) * count, dtype=torch.int64) * 16 + part % 16
        g = (numbers - 2**31).to(torch.int32).view(F32)
        p = torch.nn.Parameter(torch.zeros(count, device=device), requires_grad=False)
        p.grad = g.to(device)
        opt = danlu.Lion([p], lr=0.0, betas=(0.0, 0.0), state_dtype=BF16, backend=backend)
        opt.step()
        want = (g + 0.0).to(BF16)  # 0 * m + -0 is 0
        assert same_bits(opt.state[p]["exp_avg"], want.to(device))


@every_storage
@pytest.mark.parametrize("case", [CASES[0], CASES[4]], ids=lambda c: c.id)
def test_thousands_of_tensors_of_odd_sizes(
    case: Case, storage: Storage, backend: str, device: torch.device
) -> None:
    """Several launches, two groups, every eighth tensor empty."""
    count = 5000 if device.type == "cuda" else 1000
    results = []
    for kernels, where in ((backend, device), ("cpu", torch.device("cpu"))):
        params = []
        for i in range(count):
            p = torch.nn.Parameter(
                values((0 if i % 8 == 5 else i % 61,), i, wild=False).to(where, storage.param)
            )
            set_gradient(p, values(p.shape, i + 1, wild=False).to(where, storage.grad))
            params.append(p)
        groups = [{"params": params[::3]}, {"params": params[1::3] + params[2::3], "weight_decay": 0.0}]
        opt = case.make(groups, backend=kernels, state_dtype=storage.moment)
        opt.step()
        results.append(torch.cat([p.detach() for p in params]))
    assert same_bits(results[0].cpu(), results[1])


def test_two_dtypes_two_groups(backend: str, device: torch.device) -> None:
    results = []
    for kernels, where in ((backend, device), ("cpu", torch.device("cpu"))):
        params = [
            torch.nn.Parameter(values((100 * i + 3,), i).to(where, s.param)) for i, s in enumerate(COMPILED)
        ]
        opt = danlu.AdamW([{"params": params[:4]}, {"params": params[4:], "lr": 0.1}], backend=kernels)
        for t in range(3):
            for i, (p, storage) in enumerate(zip(params, COMPILED, strict=True)):
                set_gradient(p, values(p.shape, 50 * t + i).to(where, storage.grad))
            opt.step()
        results.append([t for p in params for t in (p.detach(), *opt.state[p].values())])
    assert all(same_bits(a.cpu(), b) for a, b in zip(*results, strict=True))


def test_dtypes_that_only_triton_takes(gpu: torch.device) -> None:
    """They reach it by themselves, and are said to."""
    storage = Storage(F16, F16, F16)
    case = CASES[4]
    got = run(case, storage, "auto", device=gpu, steps=STEPS, layouts=NATIVE)
    assert_same(got, expected(case.id, storage, True), NATIVE)
    p = torch.nn.Parameter(torch.zeros(3, dtype=F16, device=gpu))
    (row,) = danlu.AdamW([p], state_dtype=F16).backend_report()
    assert row.backend == "triton"
    assert "not cuda: no CUDA kernel for float16/float16/float16/float32" in row.reason
