"""Native CUDA kernels: a step over any number of tensors of one kind is one launch, several hundred fit into
it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING

import torch

from ..gradient_scale import GradientScale
from ..sharding import dtensor_type
from .device_rows import DeviceRows
from .native import NativePart, exchange_api, refusal_of_tensors

if TYPE_CHECKING:
    from ..optimizer import FusedOptimizer
    from ..plan import Entry

_NATIVE: ModuleType | None
try:
    from .. import _cuda as native

    _NATIVE = native
    _MISSING = ""
except ImportError as error:
    _NATIVE = None
    _MISSING = f"danlu._cuda cannot be imported ({error}); it is built where nvcc is, see README"


class Cuda:
    """The CUDA kernels of a native module, for tensors of one type of device."""

    name = "cuda"
    reason = "native kernels"

    def __init__(self, native: ModuleType | None, missing: str = "", device_type: str = "cuda") -> None:
        self.native = native
        self.device_types: tuple[str, ...] = (device_type,)
        self._missing = missing

    def unavailable(self) -> str | None:
        if self.native is None:
            return self._missing
        reason: str | None = self.native.unavailable()
        return reason

    def refusal(self, entry: Entry) -> str | None:
        device = entry.param.device
        if device.type not in self.device_types:
            return f"the parameter is on {device}, backend='cuda' takes CUDA tensors"
        if self.native is None:
            return self._missing
        if torch.version.hip is not None:
            return "this torch is built for ROCm"
        capability = _capability(self.native, self.index(device))
        if not _runs_on(self.native.architectures, capability):
            built = self.native.architectures
            return f"danlu._cuda is built for {built}, {device} has compute capability {capability / 10}"
        if self.native.coefficient_names(entry.rule) is None:
            return f"no CUDA rule {entry.rule!r}"
        if not self.native.has_kernel(entry.rule, entry.dtypes):
            return f"no CUDA kernel for {'/'.join(entry.dtypes)} (parameter/gradient/states)"
        return refusal_of_tensors(entry)

    def part(self, optimizer: FusedOptimizer, entries: Sequence[Entry]) -> CudaPart:
        return CudaPart(self, optimizer, entries)

    def index(self, device: torch.device) -> int:
        return device.index or 0

    def stream(self, device: torch.device) -> int:
        """The handle of torch's current stream."""
        return int(torch.cuda.current_stream(device).cuda_stream)

    def is_capturing(self) -> bool:
        return bool(torch.cuda.is_current_stream_capturing())


class CudaPart(NativePart):
    """The parameters of one device. Coefficients come from the host, or are computed on the device."""

    def __init__(self, backend: Cuda, optimizer: FusedOptimizer, entries: Sequence[Entry]) -> None:
        assert backend.native is not None
        self._backend = backend
        self._device = entries[0].param.device
        self._on_device = optimizer.counters_on_device
        index = backend.index(self._device) if self._device.type == "cuda" else -1
        native = backend.native.Step(exchange_api(), torch, dtensor_type(), index, self._on_device)
        super().__init__(native, backend.native, entries)
        native.bind(optimizer.state)
        self._device_rows = DeviceRows(self, entries, native.row_stride()) if self._on_device else None
        self._rows: list[tuple[float, ...]] = []
        # tensors that the kernel reads, kept until the next step
        self._clip: torch.Tensor | None = None
        self._found_inf: torch.Tensor | None = None

    @property
    def reads_host(self) -> bool:
        return not self._on_device

    def prepare(self, optimizer: FusedOptimizer, scale: GradientScale) -> None:
        if self._device_rows is not None:
            self._found_inf = scale.found_inf_on(self._device)
            self._device_rows.prepare(optimizer, scale.factor_on(self._device), self._found_inf)
            return
        if self._backend.is_capturing():
            raise RuntimeError("a step inside a CUDA graph's capture needs capturable=True")
        # a norm stays on the device, so that nothing waits for it; the sign of maximize stays in the row
        self._clip = scale.factor_on(self._device).float() if scale.clips else None
        self._rows = self.rows(optimizer, 1.0 if scale.clips else scale.factor())

    def run(self) -> None:
        self.count_writes()
        rows = self._device_rows
        self._native.run(
            self._rows,
            self._backend.stream(self._device),
            0 if rows is None else rows.address,
            0 if self._clip is None else self._clip.data_ptr(),
            0 if self._found_inf is None else self._found_inf.data_ptr(),
        )
        if rows is not None:
            rows.advance(self.active())


@functools.cache
def _capability(native: ModuleType, index: int) -> int:
    return int(native.capability(index))


def _runs_on(architectures: str, capability: int) -> bool:
    """Whether a binary for CMake's list of architectures has code for a device.

    Real code runs on its own major version, from its minor version on; PTX on everything newer.

    >>> _runs_on("80-real,90-real,100", 89), _runs_on("80-real,90-real,100", 120), _runs_on("90", 89)
    (True, True, False)
    """
    for name in architectures.split(","):
        number, _, kind = name.partition("-")
        digits = int(number.rstrip("af"))
        if kind != "virtual" and digits // 10 == capability // 10 and digits <= capability:
            return True
        if kind != "real" and number.isdigit() and digits <= capability:
            return True
    return False


CUDA = Cuda(_NATIVE, _MISSING)
