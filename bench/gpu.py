"""Tests and measurements on a GPU, stage after stage; `bash bench/gpu.sh` makes what it needs and runs it.

    python bench/gpu.py --out DIR

What tells most comes first, gpu.json is whole after each stage, and bench/gpu_plan.py decides what comes
next. A stage that fails is written down with its traceback, and the next one runs; where the failure has made
CUDA unusable in this process, the process is replaced first. Close to the end of its time a stage is
interrupted. At the end there are a table and gpu.png.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

import torch

import cuda_harness
import gpu_plan
import gpu_stages
from gpu_plan import Planned
from gpu_report import lines, plot, section
from gpu_run import Run, parsed
from gpu_stages import STAGES

ALWAYS = ("environment", "smoke", "warm")


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 0 if all stages came to their end and no test failed."""
    options = parsed(__doc__, arguments)
    missing = cuda_harness.unavailable()
    if missing:
        print(f"bench/gpu.py: {missing}", file=sys.stderr)
        return 1
    chosen = wanted(options.stages)
    gpu_stages.OUT = options.out
    run = Run(options.out / "gpu.json", options.started, options.resume)
    while (name := gpu_plan.following(chosen, run.stages)) is not None:
        stage = chosen[name]
        reason = gpu_plan.left_out(name, stage, run.stages, run.left())
        if reason is not None:
            run.skip(name, reason)
            continue
        run.perform(name, stage.run, stage.most)
        if "result" in run.stages[name]:  # also where the run does not come to its end
            for line in section(name, run.stages[name]["result"]):
                print(f"  {line}")
        if unusable():
            run.mark(name, unusable=True)
            start_anew(options)
    results = run.results()
    try:
        plot(results, options.out / "gpu.png")
    except Exception:
        traceback.print_exc()
    print("\n".join(lines(run.stages)))
    done = not any("error" in entry or "skipped" in entry for entry in run.stages.values())
    return 0 if done and results.get("tests", {}).get("exit_status", 0) == 0 else 1


def wanted(names: str) -> dict[str, Planned]:
    """All stages, or those named and the first checks."""
    chosen = list(filter(None, names.split(",")))
    unknown = [name for name in chosen if name not in STAGES]
    if unknown:
        sys.exit(f"bench/gpu.py: --stages: there is no {', '.join(unknown)}; there are {', '.join(STAGES)}")
    return {name: one for name, one in STAGES.items() if not chosen or name in (*ALWAYS, *chosen)}


def unusable() -> bool:
    """Whether an error has made CUDA unusable in this process."""
    try:
        torch.cuda.synchronize()
        cuda_harness.free()
    except Exception:
        return True
    return False


def start_anew(options: argparse.Namespace) -> None:
    """Replaces this process by one that goes on with the next stage."""
    print("CUDA is unusable in this process, going on in a new one", flush=True)
    arguments = ["--resume", "--started", str(options.started), "--out", str(options.out)]
    more = ["--stages", options.stages] if options.stages else []
    os.execv(sys.executable, [sys.executable, str(Path(__file__).resolve()), *arguments, *more])


if __name__ == "__main__":
    sys.exit(main())
