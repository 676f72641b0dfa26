"""Lazy steps by the kernels of a GPU: the bits of the CPU kernels."""

from __future__ import annotations

import functools

import pytest
import torch
from steps import kernels

import danlu
from cases import F16, STORAGES, Case, Storage
from lazy_runs import LAZY, MODES, assert_same, run

COMPILED = [storage for storage in STORAGES if storage.moment != F16]
CHOSEN = [case for case in LAZY if case.id in ("lion", "adamw", "adax-hat")]
every_mode = pytest.mark.parametrize("mode", MODES)
every_storage = pytest.mark.parametrize("storage", COMPILED[::4], ids=lambda s: s.id)


@functools.cache
def expected(case_id: str, storage: Storage, mode: str) -> list[dict[str, torch.Tensor]]:
    case = next(case for case in LAZY if case.id == case_id)
    return run(case, storage, "cpu", mode)


def on_the_host(results: list[dict[str, torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
    return [{name: value.cpu() for name, value in tensors.items()} for tensors in results]


@pytest.mark.parametrize("capturable", [False, True], ids=["host", "device"])
@every_mode
@every_storage
@pytest.mark.parametrize("case", CHOSEN, ids=lambda c: c.id)
def test_same_bits(
    case: Case, storage: Storage, mode: str, capturable: bool, backend: str, device: torch.device
) -> None:
    """Listed rows in order and in none, once and more than once, and dense gradients."""
    got = run(case, storage, backend, mode, device, capturable=capturable)
    assert_same(on_the_host(got), expected(case.id, storage, mode))


@every_mode
def test_the_kernels_are_those_of_whole_tensors(mode: str, backend: str, gpu: torch.device) -> None:
    p = torch.nn.Parameter(torch.ones(1000, 64, device=gpu))
    opt = danlu.Lazy(danlu.AdamW([p], backend=backend), mode)
    rows = torch.arange(999, 0, -2, device=gpu)
    p.grad = torch.sparse_coo_tensor(rows[None], torch.ones(500, 64, device=gpu), p.shape)
    launches = 1
    if (backend, mode) == ("cuda", "params"):
        launches = 2  # of at most 791 runs
    assert sum("apply_kernel" in name for name in kernels(opt.step)) == launches
