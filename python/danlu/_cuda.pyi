from collections.abc import Sequence
from types import ModuleType

from ._step_list import SelectingList

architectures: str
combinations: str
geometry_fields: tuple[str, ...]
summation_fields: tuple[str, ...]

def unavailable() -> str | None: ...
def capability(device: int) -> int: ...
def coefficient_names(rule: str) -> tuple[str, ...] | None: ...
def reduction(rule: str) -> tuple[str, int, bool] | None: ...
def has_kernel(rule: str, formats: Sequence[str]) -> bool: ...
def launch_plan(
    rule: str, sizes: Sequence[int], sets: Sequence[int], on_device: bool
) -> list[tuple[int, int]]: ...
def bandwidth_ceiling(
    written: Sequence[int], read: int, size: int, device: int, cuda_stream: int
) -> None: ...
def read_through(address: int, size: int, device: int, cuda_stream: int) -> None: ...
def sum_parts(
    name: str,
    device_index: int,
    stream: int,
    summations: int,
    places: int,
    blocks: int,
    scratch: int,
    addresses: int,
    num_tensors: int,
    num_formats: int,
) -> None: ...

class Step(SelectingList):
    def __init__(
        self,
        exchange_api: object,
        torch: ModuleType,
        sharded_type: type | None,
        device_index: int,
        counters_on_device: bool,
    ) -> None: ...
    def num_squares(self) -> int: ...
    def norm(self, stream: int, squares: int, norm: int, max_norm: float, grad_scale: int) -> None: ...
    def run(
        self,
        coefficients: Sequence[Sequence[float]],
        stream: int,
        device_coefficients: int,
        clip: int,
        found_inf: int,
        idle: int,
        zeros: int,
        launches: int,
    ) -> int: ...

class PassList:
    def __init__(
        self,
        rule: str,
        formats: Sequence[str],
        name: str,
        device_index: int,
        num_tensors: int,
        geometries: int,
        scratch: int,
    ) -> None: ...
    def add(self, kernel: str, first: int, count: int, reverse: bool, tensors: int, indices: int) -> None: ...
    def run(
        self,
        stream: int,
        addresses: int,
        coefficients: int,
        row_stride: int,
        clip: int,
        found_inf: int,
        launches: int,
    ) -> int: ...
