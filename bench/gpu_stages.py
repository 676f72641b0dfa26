"""What `bench/gpu.py` measures, a function for each stage; each returns what goes into the JSON."""

from __future__ import annotations

import json
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Sequence

import bars
import contenders
import cuda_harness
import gpu_background
import gpu_graphs
import gpu_groups
import gpu_lazy
import gpu_ncu
import gpu_norm
import gpu_overlap
import gpu_plan
import lazy_rows
from commands import limited
from contenders import Contender
from cuda_harness import CudaBandwidthCeiling, OnCuda
from gpu_plan import Planned
from gpu_run import Results
from harness import ROOT
from rounds import measure, profile, spread
from workloads import Workload, gpt2_small, llama_1b, llama_8b_list, many_small

BUILD = gpu_background.BUILD
OUT = ROOT / "bench" / "results"  # bench/gpu.py sets it
TESTS = ROOT / "tests" / "gpu"
MODELS = [llama_1b(), gpt2_small()]
GPT2, MANY_SMALL, LLAMA_8B = gpt2_small(), many_small(), llama_8b_list()
REDUCING = [*contenders.TORCH_ADAFACTOR, *contenders.REDUCING_ON_CUDA]
COMPILED = [contenders.TORCH_COMPILED, contenders.TORCH_ADAFACTOR_COMPILED]
CONTENDERS = [c for c in contenders.ON_CUDA if c not in (*REDUCING, *COMPILED)]
FIRST = [
    *(contenders.TORCH_ADAMW[0], contenders.TORCH_ADAMW_BF16, contenders.ADAMW, contenders.ADAMW_BF16),
    *(*contenders.LION, contenders.ADAX, contenders.TRITON[2]),
]
FIRST_REDUCING = [*contenders.TORCH_ADAFACTOR, *(c for c in contenders.REDUCING_ON_CUDA if not c.backend)]
ROUNDS, FIRST_ROUNDS = 4, 2
CEILING_ELEMENTS = 1 << 28  # 1 GiB an array
TEST_SECONDS, TUNE_SECONDS, MEMCHECK_SECONDS, WARM_SECONDS = 150.0, 60.0, 90.0, 30.0
MOST_FAILURES = 50


def environment(_: Results) -> Results:
    return cuda_harness.environment()


def smoke(_: Results) -> Results:
    """Whether the engines are right: bench/gpu_smoke.py of each, in a process of its own."""
    found = {}
    for engine in gpu_plan.ENGINES:
        status, output = gpu_background.finish(f"smoke-{engine}")
        lines = output.splitlines()
        checks = [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]
        rest = "\n".join(line for line in lines if not line.startswith("{"))
        fault = gpu_plan.fault(status, checks, rest)
        found[engine] = {"fault": fault, "exit_status": status, "checks": checks, "output": rest[-2000:]}
        if gpu_plan.overlap_is_wrong(checks):
            found[engine]["overlap"] = "wrong, turned off"
            gpu_overlap.turn_off()
    return found


def warm(_: Results) -> Results:
    """Waits for what compiles in the background: it would disturb what is timed."""
    status, output = gpu_background.finish("warm", WARM_SECONDS)
    return {"exit_status": status, "output": output[-4000:]}


def tests(_: Results) -> Results:
    """In processes of their own: a kernel that fails there must not take along what follows."""
    path = OUT / "tests.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, ROOT / "bench" / "gpu_tests.py", path, f"--confcutdir={TESTS}", TESTS]
    status, _ = limited(command, TEST_SECONDS, capture=False)
    written = path.read_text() if path.exists() else ""
    outcomes = [json.loads(line) for line in written.splitlines(keepends=True) if line.endswith("\n")]
    return {
        "exit_status": status,
        "counts": dict(Counter(o["outcome"] for o in outcomes)),
        "failures": [o for o in outcomes if o["outcome"] == "failed"][:MOST_FAILURES],
        "skipped": dict(Counter(o["message"] for o in outcomes if o["outcome"] == "skipped")),
        "longest": sorted(((o["seconds"], o["test"]) for o in outcomes), reverse=True)[:20],
    }


def ceiling(_: Results) -> Results:
    """Bytes per second of the in-place loop, by the arrays that it writes, and of a copy."""
    bandwidth = CudaBandwidthCeiling(CEILING_ELEMENTS)
    result = {}
    for written in (1, 2, 3):
        touched = 4 * (2 * written + 1) * CEILING_ELEMENTS
        result[f"ceiling_{written}_GB_per_s"] = touched / bandwidth.seconds(touched, written) / 1e9
    del bandwidth
    cuda_harness.free()
    return {**result, "copy_GB_per_s": cuda_harness.copy_bandwidth() / 1e9}


def first(results: Results) -> Results:
    """The contenders that tell most, in few rounds."""
    return compare(MODELS[0], FIRST, results, FIRST_ROUNDS)


def first_reductions(results: Results) -> Results:
    measured = compare(MODELS[0], FIRST_REDUCING, results, FIRST_ROUNDS)
    return {**measured, "bars": bars.of_steps(measured)}


def models(results: Results) -> Iterator[Results]:
    return (compare(workload, CONTENDERS, results) for workload in MODELS)


def reductions(results: Results) -> Iterator[Results]:
    """Rules that reduce, against torch's Adafactor; with what is asked of them."""
    for workload in MODELS:
        measured = compare(workload, REDUCING, results)
        yield {**measured, "bars": bars.of_steps(measured)}


def gradient_norm(_: Results) -> Iterator[Results]:
    return gpu_norm.measured(MODELS, ROUNDS)


def groups(_: Results) -> Iterator[Results]:
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


def small_tensors(results: Results) -> Results:
    return compare(MANY_SMALL, CONTENDERS, results)


def cuda_graph(_: Results) -> list[Results]:
    return gpu_graphs.times([MANY_SMALL, GPT2], ROUNDS)


def host_time(results: Results) -> Results:
    return compare(LLAMA_8B, [*CONTENDERS, *contenders.REDUCING_ON_CUDA], results)


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


def overlap(_: Results) -> list[Results]:
    """What it saves that passes start while the one before ends."""
    return gpu_overlap.saved(MODELS, ROUNDS)


def shapes(_: Results) -> list[Results]:
    """What bench/tune.cu prints; it was compiled meanwhile."""
    if shutil.which("nvcc") is None:
        return []
    status, output = gpu_background.finish("tune", TUNE_SECONDS)
    if status == 0:
        status, output = limited([BUILD / "tune"], TUNE_SECONDS)
    if status != 0:
        raise RuntimeError(f"tune: exit status {status}: {output[-3000:]}")
    return [json.loads(line) for line in output.splitlines() if line.startswith("{")]


def ncu(_: Results) -> Results:
    return gpu_ncu.profiled()


def compiled(results: Results) -> Results:
    """AdamW under torch.compile, which takes its time to compile."""
    return compare(GPT2, [contenders.TORCH_ADAMW[0], contenders.TORCH_COMPILED, contenders.ADAMW], results)


def compiled_adafactor(results: Results) -> Results:
    """Adafactor under torch.compile, which takes even longer."""
    chosen = [contenders.TORCH_ADAFACTOR_COMPILED, contenders.REDUCING_ON_CUDA[0]]
    return compare(GPT2, chosen, results)


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


# by value; a run may end before the last ones. Seconds are guesses until a GPU has run them
STAGES: dict[str, Planned] = {
    stage.__name__: Planned(stage, *what)
    for stage, *what in (
        (environment, 0, 30),
        (smoke, 0, 2 * gpu_background.SMOKE_SECONDS),
        (warm, 0, 40),
        (ceiling, 5, 30, "cuda"),
        (first, 10, 60, "any"),
        (first_reductions, 10, 60, "cuda"),
        (tests, 20, TEST_SECONDS + 10),
        (gradient_norm, 5, 40, "cuda"),
        (overlap, 5, 40, "cuda"),
        (small_tensors, 10, 60, "any"),
        (cuda_graph, 5, 40, "cuda"),
        (host_time, 5, 40, "any"),
        (shapes, 10, 2 * TUNE_SECONDS + 10, "cuda"),
        (ncu, 15, gpu_ncu.SECONDS + 10, "cuda"),
        (models, 10, 90, "any"),
        (reductions, 10, 90, "any"),
        (profiles, 10, 40, "cuda"),
        (groups, 10, 60, "cuda"),
        (compiled, 20, 60, "cuda"),
        (memcheck, 15, MEMCHECK_SECONDS + 10),
        (lazy_steps, 5, 40, "cuda"),
        (zero_gradients, 5, 30, "cuda"),
        (compiled_adafactor, 20, 90, "cuda"),
    )
}


def compare(
    workload: Workload, chosen: Sequence[Contender], results: Results, rounds: int = ROUNDS
) -> Results:
    """Paired rounds on the GPU of torch's contenders and of those whose engine was right."""
    wrong = gpu_plan.faults({name: {"result": result} for name, result in results.items()})
    seen: list[str] = []

    def show(round_: str, _: str) -> None:
        if round_ not in seen:
            seen.append(round_)
            print(f"  {round_}")

    right = [c for c in chosen if c.id.startswith("torch") or (c.backend or "cuda") not in wrong]
    measured = measure(OnCuda, workload, right, range(rounds + 1), show)
    cuda_harness.free()
    return measured
