"""What the GPU backends share: coefficients from the host, or counters and coefficients on the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..gradient_scale import GradientScale
from .device_rows import DeviceRows
from .native import CoefficientNames, NativePart

if TYPE_CHECKING:
    from ..optimizer import FusedOptimizer
    from ..plan import Entry


class GpuPart(NativePart):
    """The parameters of one device, up to their launches."""

    def __init__(
        self,
        native: Any,
        rules: CoefficientNames,
        optimizer: FusedOptimizer,
        entries: Sequence[Entry],
        row_stride: int,
    ) -> None:
        super().__init__(native, rules, entries)
        native.bind(optimizer.state)
        self.device = entries[0].param.device
        on_device = optimizer.counters_on_device
        self._device_rows = DeviceRows(self, entries, row_stride) if on_device else None
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
        self.count_writes()
        self.launch()
        if self._device_rows is not None:
            self._device_rows.advance(self.active())

    def launch(self) -> None:
        """Enqueues the kernels, and counts the step where the counters are on the host."""
        raise NotImplementedError

    def is_capturing(self) -> bool:
        return self.device.type == "cuda" and bool(torch.cuda.is_current_stream_capturing())
