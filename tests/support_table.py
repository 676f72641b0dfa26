"""README's table of what each optimizer supports, found by asking optimizers and backends themselves.

`PYTHONPATH=tests .venv/bin/python tests/support_table.py` prints it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from unittest import mock

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

import danlu
from danlu import capture
from danlu.backends import BACKENDS
from danlu.backends.triton import Triton
from emulated import emulated

COLUMNS = ("CPU", "CUDA", "Triton", "FSDP2", "low precision", "capturable")
NATIVE = ("cpu", "cuda", "triton")
YES, NO = "yes", "no"
BF16, F16 = torch.bfloat16, torch.float16
Make = Callable[..., torch.optim.Optimizer]


class TritonOverCpu(Triton):
    """Asked about tensors on the CPU, which it never steps."""

    device_types = ("cpu",)

    def unavailable(self) -> str | None:
        return None


def markdown() -> str:
    lines = [f"| | {' | '.join(COLUMNS)} |", f"|---|{'---|' * len(COLUMNS)}"]
    with mock.patch.dict(BACKENDS, cuda=emulated(), triton=TritonOverCpu()):
        for name, make in rows():
            asked = [*(takes(make, backend) for backend in NATIVE), takes_shards(make)]
            cells = [*map(mark, asked), low_precision(make), mark(can_be_captured(make))]
            lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def rows() -> Iterator[tuple[str, Make]]:
    """Each optimizer of danlu by its name, then each wrapper, around AdamW."""
    public = {name: getattr(danlu, name) for name in danlu.__all__}
    optimizers = {
        n: c for n, c in public.items() if isinstance(c, type) and issubclass(c, torch.optim.Optimizer)
    }
    del optimizers["FusedOptimizer"]
    for name, kind in sorted(optimizers.items(), key=lambda item: item[0].lower()):
        if not is_wrapper(kind):
            yield name, lambda params, kind=kind, **engine: kind(params, lr=1e-3, **engine)
    for name, kind in sorted(optimizers.items()):
        if is_wrapper(kind):
            settings = {"steps": 2} if kind is danlu.GradientAccumulation else {}
            yield (
                f"{name}(AdamW)",
                lambda params, kind=kind, settings=settings, **engine: kind(
                    danlu.AdamW(params, lr=1e-3, **engine), **settings
                ),
            )


def is_wrapper(kind: type) -> bool:
    return hasattr(kind, "check_order")


def mark(supported: bool) -> str:
    return YES if supported else NO


def takes(make: Make, backend: str, dtype: torch.dtype = torch.float32, **engine: object) -> bool:
    """Whether the backend's kernels take matrices and vectors of that dtype."""
    report = make(some_params(dtype), backend=backend, **engine).backend_report()
    return {row.backend for row in report} == {backend}


def takes_shards(make: Make) -> bool:
    """Whether the kernels step DTensors, as `fully_shard` makes them."""
    mesh = DeviceMesh("cpu", [0], _init_backend=False, _rank=0)
    shards = [DTensor.from_local(p.detach(), mesh, [Shard(0)], run_check=False) for p in some_params()]
    try:
        report = make([torch.nn.Parameter(shard) for shard in shards], backend="cpu").backend_report()
    except ValueError as error:
        if "takes no DTensor" not in str(error):
            raise
        return False
    return {row.backend for row in report} == {"cpu"}


def low_precision(make: Make) -> str:
    """Whether parameters and gradients may be bf16 and fp16, and which states may be bf16."""
    if not all(takes(make, backend, dtype) for backend in NATIVE for dtype in (BF16, F16)):
        return NO
    if not all(takes(make, backend, BF16, state_dtype=BF16) for backend in NATIVE):
        return YES
    optimizer = make(some_params(BF16), state_dtype=BF16)
    optimizer.make_state()
    kept = {name for state in optimizer.state.values() for name, x in state.items() if x.dtype == BF16}
    return ", ".join([YES, *(f"`{name}`" for name in sorted(kept))])


def can_be_captured(make: Make) -> bool:
    """Whether a CUDA graph may capture a step: it never asks the host for what only the device knows."""
    params = some_params()
    optimizer = make(params, backend="cuda", capturable=True)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    with mock.patch.object(capture, "is_capturing", return_value=True):
        try:
            optimizer.step()
        except RuntimeError as error:
            if "graph" not in str(error):
                raise
            return False
    return True


def some_params(dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in ((8, 4), (4,))]


if __name__ == "__main__":
    print(markdown(), end="")
