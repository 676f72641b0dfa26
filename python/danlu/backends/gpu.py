"""What the GPU backends share: coefficients from the host, or counters and coefficients on the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from ..gradient_scale import GradientScale
from .device_rows import DeviceRows
from .native import ROW_HEADER, CoefficientNames, NativePart

if TYPE_CHECKING:
    from .._step_list import StepList
    from ..optimizer import FusedOptimizer
    from ..plan import Entry


class GpuPart(NativePart):
    """The parameters of one device, up to their launches."""

    def __init__(
        self,
        native: StepList,
        rules: CoefficientNames,
        optimizer: FusedOptimizer,
        entries: Sequence[Entry],
    ) -> None:
        super().__init__(native, rules, optimizer, entries)
        self._row_stride = ROW_HEADER + max(len(names or ()) for names in self._names.values())
        self.device = entries[0].param.device
        on_device = optimizer.counters_on_device
        self._device_rows = DeviceRows(self, entries, self._row_stride) if on_device else None
        self._rows: list[tuple[float, ...]] = []
        # tensors that the kernels read, kept until the next step
        self._clip: torch.Tensor | None = None
        self._found_inf: torch.Tensor | None = None

    @property
    def reads_host(self) -> bool:
        return self._device_rows is None

    def prepare(self, optimizer: FusedOptimizer, scale: GradientScale) -> None:
        if self._device_rows is not None:
            self._found_inf = scale.found_inf_on(self.device)
            self._device_rows.prepare(optimizer, scale.factor_on(self.device), self._found_inf)
            return
        if self.is_capturing():
            raise RuntimeError("a step inside a CUDA graph's capture needs capturable=True")
        # a norm stays on the device, so that nothing waits for it; the sign of maximize stays in the row
        self._clip = scale.factor_on(self.device).float() if scale.clips else None
        self._rows = self.rows(optimizer, 1.0 if scale.clips else scale.factor())

    def run(self) -> None:
        active = self.active()
        self.count_writes(active)
        self.launch()
        if self._device_rows is not None:
            self._device_rows.advance(active)

    def launch(self) -> None:
        """Enqueues the kernels, and counts the step where the counters are on the host."""
        raise NotImplementedError

    def is_capturing(self) -> bool:
        return self.device.type == "cuda" and bool(torch.cuda.is_current_stream_capturing())
