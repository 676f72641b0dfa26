"""A training of the benchmark on several processes, each with a part of every parameter (FSDP2).

Each rank takes its part of every batch. FSDP2 averages gradients over the ranks, so a step is that of one
process but for the order in which numbers are added up. Checkpoints and saved weights hold whole tensors.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from model import GPT
from training_run import Run, save

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


class ShardedRun(Run):
    """One optimizer's training, on this rank."""

    PARTS = ("scheduler", "batches")  # what is the same on all ranks

    @staticmethod
    def is_first() -> bool:
        return dist.get_rank() == 0

    def make_model(self) -> GPT:
        model = super().make_model()
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        # else the outermost parameters are whole after an evaluation, not those that the optimizer steps
        for part in (*model.blocks, model):
            fully_shard(part, mesh=mesh, reshard_after_forward=True)
        return model

    def own(self, windows: torch.Tensor) -> torch.Tensor:
        return windows.chunk(dist.get_world_size())[dist.get_rank()]

    def of_all(self, number: float) -> float:
        total = torch.tensor(number, dtype=torch.float64)
        dist.all_reduce(total)
        return total.item()

    def weights(self) -> dict[str, Any]:
        return get_model_state_dict(self.model, options=WHOLE)

    def save(self, checkpoint: Path) -> None:
        state = self.state_dict()
        if self.is_first():
            save(state, checkpoint)

    def state_dict(self) -> dict[str, Any]:
        """Whole on rank 0, which is the one that saves it."""
        optimizer = get_optimizer_state_dict(self.model, self.optimizer, options=WHOLE)
        return super().state_dict() | {"model": self.weights(), "optimizer": optimizer}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        set_model_state_dict(self.model, state["model"], options=WHOLE)
        set_optimizer_state_dict(self.model, self.optimizer, state["optimizer"], options=WHOLE)
        super().load_state_dict(state)
