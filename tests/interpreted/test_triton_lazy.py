"""Lazy steps by Triton kernels, which are the element-wise ones over runs of rows, in the interpreter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

import danlu
from cases import CASES, F16, F32, STORAGES, Case, Storage, values
from danlu.testing import same_bits
from lazy_runs import LAZY, MODES, assert_same, coo, run

COMPILED = [storage for storage in STORAGES if storage.moment != F16]
SHAPES = [(20, 3), (7,), (2, 16_389), (0, 4), (4, 0), (6, 2, 5), (8, 997)]
ADAMW = CASES[4]
every_mode = pytest.mark.parametrize("mode", MODES)
# the engine is one; rules run in test_triton_bits.py, AdamW's rows in test_machine_code_ptx.py
FEW_RULES, FEW_STORAGES = ("lion",), ("f32-f32-bf16",)


def some(found: Sequence[Any], few: Sequence[str]) -> list[Any]:
    return [x if x.id in few else pytest.param(x, marks=pytest.mark.full) for x in found]


def assert_same_as_the_reference(case: Case, storage: Storage, mode: str, **engine: Any) -> None:
    got, want = (
        run(case, storage, backend, mode, shapes=SHAPES, **options)
        for backend, options in (("triton", engine), ("reference", {}))
    )
    assert_same(got, want, SHAPES)


@every_mode
@pytest.mark.parametrize("case", some(LAZY, FEW_RULES), ids=lambda c: c.id)
def test_same_bits_as_the_reference(case: Case, mode: str) -> None:
    assert_same_as_the_reference(case, COMPILED[0], mode)


@every_mode
@pytest.mark.parametrize("storage", some(COMPILED[1:], FEW_STORAGES), ids=lambda s: s.id)
def test_same_bits_in_every_storage(storage: Storage, mode: str) -> None:
    assert_same_as_the_reference(LAZY[0], storage, mode)


@pytest.mark.parametrize("mode", [pytest.param("rows", marks=pytest.mark.full), "params"])
def test_same_bits_with_coefficients_from_the_device(mode: str) -> None:
    assert_same_as_the_reference(ADAMW, COMPILED[0], mode, capturable=True)


@every_mode
def test_the_norm_is_that_of_what_is_listed(mode: str) -> None:
    """Of another number of rows in every step; entries of a row are summed before."""
    shape = (40, 700)
    p = torch.nn.Parameter(torch.zeros(shape))
    inner = danlu.AdamW([p], max_grad_norm=2.0, betas=(0.0, 0.999), backend="triton")
    opt = danlu.Lazy(inner, mode)
    for rows in ([5, 1, 5], [*range(39, 0, -1)], [3]):
        rows_values = values((len(rows), shape[1]), len(rows), wild=False)
        dense = torch.zeros(shape).index_add_(0, torch.tensor(rows), rows_values)
        for p.grad in (coo(rows, rows_values, shape), dense):  # type: ignore[misc]
            opt.step()
            scaled = opt.state[p]["exp_avg"][rows]
            want = dense[rows] * (2.0 / dense.double().norm().item())
            torch.testing.assert_close(scaled, want, rtol=1e-6, atol=0)


def test_a_first_step_without_rows() -> None:
    p = torch.nn.Parameter(torch.ones(5, 3))
    opt = danlu.Lazy(danlu.Lion([p], backend="triton"))
    p.grad = torch.zeros(5, 3)
    opt.step()
    p.grad[2, 1] = 1.0
    opt.step()
    assert opt.state[p]["step"] == 2
    assert [i for i in range(5) if not same_bits(p[i], torch.ones(3, dtype=F32))] == [2]
