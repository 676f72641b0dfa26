"""Tables in device memory that the kernels of rules that reduce read, CUDA's and Triton's alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from .. import formats
from ..schedule import FIELDS, Map, Reduction, Schedule
from ..spec import ParamSpec
from .staged_table import StagedTable

# of the L2 cache, for the gradients of a group: what the passes read beside them has to fit, too
GRADIENTS_SHARE = 0.5
# what the passes of a group take beyond their bytes, in seconds: launches that wait for one another
GROUP_SECONDS = 25e-6
# where the cache is too small for the memory's speed: keeps the scratch small, costs few launches
GROUP_BYTES = 2**30


class ReducingTensors:
    """Entries of one rule and one combination of formats, none of them empty.

    `schedule` says what is launched. Written once: `geometries`, int64 [tensors][fields]; `maps`, for each
    pass an int32 tensor [2][blocks] of tensors and of indices within them. `scratch` is what the passes of a
    group leave for one another. `addresses` is sent at each step, as far as it changed: `AddressList.table`.
    """

    def __init__(self, reduction: Reduction, specs: Sequence[ParamSpec], group_bytes: float) -> None:
        first = specs[0]
        matrices = [spec.matrix or (1, 1, math.prod(spec.shape)) for spec in specs]
        itemsize = formats.named(first.formats[1]).arrays[0].dtype.itemsize
        self.rule, self.formats, self.name = first.rule, first.formats, first.name
        self.schedule = Schedule(matrices, reduction, itemsize, group_bytes)
        self.device = first.param.device
        fields = [[getattr(g, field) for field in FIELDS] for g in self.schedule.geometries]
        self.geometries = torch.tensor(fields, dtype=torch.int64, device=self.device)
        self.maps = {kernel: self._table(blocks) for kernel, blocks in self.schedule.maps.items()}
        self.maps["reduce_norms"] = self.maps["apply"]
        self.scratch = torch.empty(self.schedule.scratch_bytes, dtype=torch.uint8, device=self.device)
        self.addresses = StagedTable(8 * formats.table_rows(self.formats) * len(specs), self.device)

    @property
    def tables(self) -> list[torch.Tensor]:
        """All that the kernels read beside what the step is about."""
        return [self.geometries, self.scratch, self.addresses.table, *self.maps.values()]

    def _table(self, blocks: Map) -> torch.Tensor:
        return torch.tensor([blocks.tensors, blocks.indices], dtype=torch.int32, device=self.device)


def reducing_tensors(
    specs: Sequence[ParamSpec], reduction: Callable[[str], Reduction | None], group_bytes: float
) -> list[tuple[list[int], ReducingTensors]]:
    """The specs whose rules reduce, with their indices: those of one rule and one combination of formats
    together.
    """
    alike: dict[tuple[str, tuple[str, ...]], list[int]] = {}
    for i, spec in enumerate(specs):
        if math.prod(spec.shape) and reduction(spec.rule) is not None:
            alike.setdefault((spec.rule, spec.formats), []).append(i)
    found = []
    for (rule, _), indices in alike.items():
        sums = reduction(rule)
        assert sums is not None
        found.append((indices, ReducingTensors(sums, [specs[i] for i in indices], group_bytes)))
    return found


def group_bytes(device: torch.device) -> float:
    """Of gradients that go through all passes together.

    Those that the L2 cache holds, if reading them from there twice saves more time than a group costs.
    """
    if device.type != "cuda":
        return math.inf
    properties = torch.cuda.get_device_properties(device)
    cached = GRADIENTS_SHARE * properties.L2_cache_size
    clock, width = (getattr(properties, name, 0) for name in ("memory_clock_rate", "memory_bus_width"))
    bytes_per_second = 2e3 * clock * width / 8 or math.inf  # at both edges of a clock in kHz
    return cached if 2 * cached / bytes_per_second > GROUP_SECONDS else GROUP_BYTES
