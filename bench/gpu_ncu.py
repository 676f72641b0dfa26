"""Hardware counters of three kernels by Nsight Compute; `python bench/gpu_ncu.py` makes the steps it sees.

The card's clocks are left as they are (--clock-control none).
"""

from __future__ import annotations

import csv
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from commands import limited

SECONDS = 60.0
KERNELS = 3
SECTIONS = ("SpeedOfLight", "MemoryWorkloadAnalysis", "Occupancy", "LaunchStats", "WarpStateStats")
CONTENDERS = ("adamw", "lion-bf16", "adamw-triton")


def profiled() -> dict[str, Any]:
    """What ncu says of each kernel: a value and its unit by section and metric."""
    tool = shutil.which("ncu")
    if tool is None:
        return {"outcome": "ncu is not installed"}
    sections = [option for name in SECTIONS for option in ("--section", name)]
    chosen = ["--clock-control", "none", "--profile-from-start", "off", "--launch-count", str(KERNELS)]
    shown = ["--csv", "--page", "details", "--print-units", "base"]
    status, output = limited([tool, *chosen, *sections, *shown, sys.executable, Path(__file__)], SECONDS)
    kernels = parsed(output.splitlines())
    outcome = f"{len(kernels)} kernels" if kernels else "no kernels"
    if status != 0:
        outcome += f", {f'not done after {SECONDS:.0f} s' if status is None else f'exit status {status}'}"
    return {"outcome": outcome, "kernels": kernels, "output": output[-2000:] if status or not kernels else ""}


def parsed(lines: Iterable[str]) -> list[dict[str, Any]]:
    """Kernels in the order of their launches; lines before the table are the program's."""
    rows = csv.DictReader(line for line in lines if line.startswith('"'))
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        if not row.get("Metric Name"):
            continue  # a rule's advice
        kernel = found.setdefault(row["ID"], {"kernel": row["Kernel Name"][:200], "metrics": {}})
        section, name = row["Section Name"], row["Metric Name"]
        kernel["metrics"][f"{section}: {name}"] = [row["Metric Value"], row["Metric Unit"]]
    return list(found.values())


def main() -> None:
    """A step of each contender between the marks that ncu looks for, after one that it does not see."""
    import torch

    import contenders
    import cuda_harness
    from harness import Model
    from workloads import gpt2_small

    by_id = {c.id: c for c in contenders.ON_CUDA}
    for name in CONTENDERS:
        contender = by_id[name]
        model = Model(gpt2_small(), contender.dtype, cuda_harness.DEVICE)
        model.hold_gradients()
        optimizer = contender.make(model.parameters)
        optimizer.step()
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        optimizer.step()
        torch.cuda.profiler.stop()
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
