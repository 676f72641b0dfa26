"""Each access of a warp takes whole sectors of 32 bytes: a part of one costs as much."""

from __future__ import annotations

import numpy as np
import pytest

from cases import CASES, F16, STORAGES, Case, Storage
from machine_code.sass.launches import Executor
from machine_code.sass.machine import WARP, Access
from test_sass import execute, library, optimizer, stepped, tensors  # noqa: F401  fixtures

SECTOR = 32
ALIGNED = [(3 * 2048, 0)]  # turns of the loop, and no tail
COMPILED = [storage for storage in STORAGES if storage.moment != F16]


@pytest.mark.parametrize("storage", COMPILED, ids=lambda s: s.id)
@pytest.mark.parametrize("case", [CASES[0], CASES[4]], ids=lambda c: c.id)
def test_accesses_take_whole_sectors(case: Case, storage: Storage, execute: Executor) -> None:  # noqa: F811
    stepped(optimizer(case, storage, ALIGNED, backend="cuda"), storage, 1)
    (machine,) = execute.machines
    states = len(case.optimizer.state_names)
    assert sum(access.stores for access in machine.accesses) >= 1 + states
    assert all(access.bytes >= 8 for access in machine.accesses)  # of the loop over packs
    parts = {str(access.instruction) for access in machine.accesses if touches_a_part(access)}
    assert not parts, "\n".join(sorted(parts))


def touches_a_part(access: Access) -> bool:
    """Whether the lanes of some warp leave out a part of a sector that they touch."""
    touched = access.addresses[:, None] + np.arange(access.bytes, dtype=np.uint64)
    places = access.threads.astype(np.uint64)[:, None] // np.uint64(WARP) << np.uint64(48) | touched
    _, counts = np.unique(np.unique(places) // np.uint64(SECTOR), return_counts=True)
    return bool((counts < SECTOR).any())
