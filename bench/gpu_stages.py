"""What `bench/gpu.py` measures, a function for each stage; each returns what goes into the JSON."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import bars
import contenders
import cuda_harness
import gpu_graphs
import gpu_groups
import gpu_lazy
import gpu_norm
import lazy_rows
from contenders import Contender
from cuda_harness import CudaStream, OnCuda
from harness import ROOT
from rounds import measure, profile, spread
from workloads import Workload, gpt2_small, llama_1b, llama_8b_list, many_small

BUILD = ROOT / "build" / "gpu"
TESTS = ROOT / "tests" / "gpu"
MODELS = [llama_1b(), gpt2_small()]
GPT2, MANY_SMALL, LLAMA_8B = gpt2_small(), many_small(), llama_8b_list()
REDUCING = [*contenders.TORCH_ADAFACTOR, *contenders.REDUCING_ON_CUDA]
COMPILED = [contenders.TORCH_COMPILED, contenders.TORCH_ADAFACTOR_COMPILED]
CONTENDERS = [c for c in contenders.ON_CUDA if c not in (*REDUCING, *COMPILED)]
ROUNDS = 4
STREAM_ELEMENTS = 1 << 28  # 1 GiB an array
TEST_SECONDS, TUNE_SECONDS, MEMCHECK_SECONDS = 210.0, 60.0, 60.0

Results = dict[str, Any]  # of the stages so far, by their names


def environment(_: Results) -> Results:
    return cuda_harness.environment()


def tests(_: Results) -> Results:
    """In a process of their own: a kernel that fails there must not take along what follows."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "outcomes"
        command = [sys.executable, ROOT / "bench" / "gpu_tests.py", path, f"--confcutdir={TESTS}", TESTS]
        status, _ = limited(command, TEST_SECONDS, capture=False)
        written = path.read_text() if path.exists() else ""
    outcomes = [json.loads(line) for line in written.splitlines(keepends=True) if line.endswith("\n")]
    return {
        "exit_status": status,
        "counts": dict(Counter(o["outcome"] for o in outcomes)),
        "failures": [o for o in outcomes if o["outcome"] == "failed"],
        "skipped": dict(Counter(o["message"] for o in outcomes if o["outcome"] == "skipped")),
    }


def ceiling(_: Results) -> Results:
    """Bytes per second of the in-place stream, by the arrays that it writes, and of a copy."""
    stream = CudaStream(STREAM_ELEMENTS)
    result = {}
    for written in (1, 2, 3):
        touched = 4 * (2 * written + 1) * STREAM_ELEMENTS
        result[f"stream_{written}_GB_per_s"] = touched / stream.seconds(touched, written) / 1e9
    del stream
    cuda_harness.free()
    return {**result, "copy_GB_per_s": cuda_harness.copy_bandwidth() / 1e9}


def models(_: Results) -> list[Results]:
    return [compare(workload, CONTENDERS) for workload in MODELS]


def reductions(_: Results) -> list[Results]:
    """Rules that reduce, against torch's Adafactor; with what is asked of them."""
    found = [compare(workload, REDUCING) for workload in MODELS]
    return [{**measured, "bars": bars.of_steps(measured)} for measured in found]


def gradient_norm(_: Results) -> list[Results]:
    return gpu_norm.measured(MODELS, ROUNDS)


def groups(_: Results) -> list[Results]:
    return gpu_groups.swept(MODELS, ROUNDS)


def lazy_steps(_: Results) -> list[Results]:
    return gpu_lazy.times(lazy_rows.SHAPE, lazy_rows.LISTED, ROUNDS)


def zero_gradients(_: Results) -> list[Results]:
    """Whether zeros, in all state too, take another time than other numbers."""
    chosen = [c for c in CONTENDERS if c.id in ("adamw", "adax", "lion")]
    usual, zero = (OnCuda(GPT2, {c.dtype for c in chosen}) for _ in range(2))
    zero.zero_gradients()
    rows = []
    for c in chosen:
        turns = [(usual.turn(c).step, zero.turn(c).step) for _ in range(ROUNDS)]
        rows.append(
            {
                "name": c.id,
                "ms": spread(1e3 * a for a, _ in turns),
                "zero_ms": spread(1e3 * b for _, b in turns),
                "zero_to_usual": spread(b / a for a, b in turns),
            }
        )
    return rows


def small_tensors(_: Results) -> Results:
    return compare(MANY_SMALL, CONTENDERS)


def cuda_graph(_: Results) -> list[Results]:
    return gpu_graphs.times([MANY_SMALL, GPT2], ROUNDS)


def host_time(_: Results) -> Results:
    return compare(LLAMA_8B, [*CONTENDERS, *contenders.REDUCING_ON_CUDA])


def profiles(results: Results) -> list[Results]:
    """Kernels of the steps that were timed, into their rows, and those of a replay.

    After everything that is timed on the host: the profiler may leave its mark on the time of launches.
    """
    workloads = {w.id: w for w in (*MODELS, MANY_SMALL)}
    for measured in (*results.get("models", []), *filter(None, [results.get("small_tensors")])):
        profile(workloads[measured["id"]], CONTENDERS, measured)
    for measured in results.get("reductions", []):
        profile(workloads[measured["id"]], REDUCING, measured)
    return gpu_graphs.kernel_counts([MANY_SMALL, GPT2])


def shapes(_: Results) -> list[Results]:
    """What bench/tune.cu prints."""
    major, minor = torch.cuda.get_device_capability()
    BUILD.mkdir(parents=True, exist_ok=True)
    flags = ["-std=c++17", "-O3", "-fmad=false", f"-arch=sm_{major}{minor}", "-I", ROOT / "csrc"]
    for command in (["nvcc", *flags, ROOT / "bench" / "tune.cu", "-o", BUILD / "tune"], [BUILD / "tune"]):
        status, output = limited(command, TUNE_SECONDS)
        if status != 0:
            raise RuntimeError(f"{command[0]}: exit status {status}: {output[-3000:]}")
    return [json.loads(line) for line in output.splitlines() if line.startswith("{")]


def compiled(_: Results) -> Results:
    """AdamW under torch.compile, which takes its time to compile."""
    return compare(GPT2, [contenders.TORCH_ADAMW[0], contenders.TORCH_COMPILED, contenders.ADAMW])


def compiled_adafactor(_: Results) -> Results:
    """Adafactor under torch.compile, which takes even longer."""
    chosen = [contenders.TORCH_ADAFACTOR_COMPILED, contenders.REDUCING_ON_CUDA[0]]
    return compare(GPT2, chosen)


def memcheck(_: Results) -> Results:
    """compute-sanitizer over a few small steps."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return {"outcome": "compute-sanitizer is not installed"}
    script = [sys.executable, ROOT / "bench" / "memcheck.py"]
    command = [tool, "--tool", "memcheck", "--error-exitcode", "9", *script]
    status, output = limited(command, MEMCHECK_SECONDS, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    outcome = {0: "no errors", 9: "ERRORS", None: f"not done after {MEMCHECK_SECONDS:.0f} s"}
    return {"outcome": outcome.get(status, f"exit status {status}"), "output": output[-3000:]}


STAGES: dict[str, Callable[[Results], Any]] = {
    stage.__name__: stage
    for stage in (
        environment,
        tests,
        ceiling,
        models,
        reductions,
        gradient_norm,
        groups,
        lazy_steps,
        zero_gradients,
        small_tensors,
        cuda_graph,
        host_time,
        profiles,
        shapes,
        compiled,
        memcheck,
        compiled_adafactor,
    )
}


def compare(workload: Workload, chosen: Sequence[Contender]) -> Results:
    """Paired rounds on the GPU."""
    seen: list[str] = []

    def show(round_: str, _: str) -> None:
        if round_ not in seen:
            seen.append(round_)
            print(f"  {round_}")

    measured = measure(OnCuda, workload, chosen, range(ROUNDS + 1), show)
    cuda_harness.free()
    return measured


def limited(
    command: Sequence[str | Path], seconds: float, capture: bool = True, **env: str
) -> tuple[int | None, str]:
    """Exit status, None if the time was up, and output of a command that is ended with all its children."""
    pipe = subprocess.PIPE if capture else None
    process = subprocess.Popen(
        [str(part) for part in command],
        stdout=pipe,
        stderr=subprocess.STDOUT if capture else None,
        text=True,
        env={**os.environ, **env},
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=seconds)
        return process.returncode, output or ""
    except BaseException as error:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        if isinstance(error, subprocess.TimeoutExpired):
            return None, output or ""
        raise
