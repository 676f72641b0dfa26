"""Processes of this machine that share parameters: ranks in a group of gloo, one thread each."""

from __future__ import annotations

import datetime
import logging
import pickle
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

PATIENCE = datetime.timedelta(minutes=5)  # for which a rank waits for the others


def run_on(
    ranks: int, work: Callable[..., object], *arguments: object, patience: datetime.timedelta = PATIENCE
) -> Any:
    """What work(*arguments) returns on rank 0 of so many; raises what it raises on one of them."""
    with tempfile.TemporaryDirectory() as folder:
        # forked, since importing torch takes seconds
        torch.multiprocessing.start_processes(
            _main, (ranks, Path(folder), work, arguments, patience), nprocs=ranks, start_method="fork"
        )
        return pickle.loads((Path(folder) / "returned").read_bytes())


def _main(
    rank: int,
    ranks: int,
    folder: Path,
    work: Callable[..., object],
    arguments: Sequence[object],
    patience: datetime.timedelta,
) -> None:
    torch.set_num_threads(1)
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks, timeout=patience
    )
    try:
        returned = work(*arguments)
        if rank == 0:
            (folder / "returned").write_bytes(pickle.dumps(returned))
    finally:
        dist.destroy_process_group()
