from collections.abc import Sequence
from types import ModuleType

from ._step_list import StepList

architectures: str

def unavailable() -> str | None: ...
def capability(device: int) -> int: ...
def coefficient_names(rule: str) -> tuple[str, ...] | None: ...
def has_kernel(rule: str, dtypes: Sequence[str]) -> bool: ...
def launch_plan(
    rule: str, sizes: Sequence[int], rows: Sequence[int], rows_on_device: bool
) -> list[tuple[int, int]]: ...
def stream(written: Sequence[int], read: int, size: int, device: int, cuda_stream: int) -> None: ...

class Step(StepList):
    def __init__(
        self,
        exchange_api: object,
        torch: ModuleType,
        sharded_type: type | None,
        device_index: int,
        counters_on_device: bool,
    ) -> None: ...
    def run(
        self, rows: Sequence[Sequence[float]], stream: int, device_rows: int, clip: int, found_inf: int
    ) -> int: ...
