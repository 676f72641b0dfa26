"""Fills Triton's cache with the kernels that the stages of `bench/gpu.py` need, on several cores.

    python bench/gpu_warm.py            all of them, in several processes
    python bench/gpu_warm.py 0 12       every twelfth

Triton compiles a kernel where it is first launched, on one core. Processes that
make steps with small tensors, of the kinds that the models have, leave the binaries where the measurement
finds them.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

# widths of every number of lanes that the models' matrices have, and a vector
SHAPES = [(64, 64), (64, 512), (64, 768), (64, 8192), (40,)]
MOST_PROCESSES = 12
NORMS = {"norm-float32": "float32", "norm-bfloat16": "bfloat16"}


def main(arguments: Sequence[str]) -> int:
    if arguments:
        first, every = map(int, arguments)
        for name, job in itertools.islice(jobs().items(), first, None, every):
            start = time.perf_counter()
            job()
            print(f"{name} {time.perf_counter() - start:.1f} s", flush=True)
        return 0
    count = min(MOST_PROCESSES, max(1, (os.cpu_count() or 1) - 4))  # others build and check meanwhile
    command = [sys.executable, __file__]
    running = [subprocess.Popen([*command, str(i), str(count)]) for i in range(count)]
    return max(abs(process.wait()) for process in running)


def jobs() -> dict[str, Callable[[], object]]:
    """What compiles, by the contender or norm that needs it."""
    import torch

    import contenders
    import cuda_harness
    from grad_norm import native_norm
    from harness import Model
    from workloads import Workload

    def model(dtype: torch.dtype) -> Model:
        made = Model(Workload("warm", "every kind of tensor", SHAPES), dtype, cuda_harness.DEVICE)
        made.hold_gradients()
        return made

    def step(contender: contenders.Contender) -> None:
        contender.make(model(contender.dtype).parameters).step()

    def norm(dtype: torch.dtype) -> None:
        native_norm(model(dtype), "triton")()

    found: dict[str, Callable[[], object]] = {}
    for contender in contenders.ON_CUDA:
        if contender.backend == "triton":
            found[contender.id] = lambda contender=contender: step(contender)
    for name, dtype in NORMS.items():
        found[name] = lambda dtype=dtype: norm(getattr(torch, dtype))
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
