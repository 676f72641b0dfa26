"""Rehearses `bench/gpu.sh` where there is no GPU, to the end and killed at random moments.

    python bench/rehearsal.py --kills 5 > bench/results/rehearsal.txt

All stages run over CPU tensors and small workloads, with fakes for what only a GPU has; the first checks and
some of the tests run the CUDA kernels in the emulator. Whenever it is killed, gpu.json must load. No time
printed here is of a GPU.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TESTS = "test_two_dtypes_two_groups or test_the_norm_of_all_gradients"
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "bench")]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", metavar="N", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: %(default)s)")
    parser.add_argument(
        "--stand-in", metavar="NAME", help=argparse.SUPPRESS
    )  # for a program, or a run in DIR
    parser.add_argument("--out", metavar="DIR", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.stand_in:
        return stand_in(options.stand_in, options.out)
    with tempfile.TemporaryDirectory() as folder:
        return rehearse(Path(folder), options.kills, random.Random(options.seed))


def rehearse(folder: Path, kills: int, moments: random.Random) -> int:
    print("A rehearsal on a CPU, over fakes: no figure here is of a GPU.\n")
    start = time.time()
    run = subprocess.run(command(folder / "whole"), capture_output=True, text=True)
    took = time.time() - start
    stages = json.loads((folder / "whole" / "gpu.json").read_text())["stages"]
    for name, entry in stages.items():
        at, seconds, outcome = entry.get("at", 0.0), entry.get("seconds", 0.0), "done"
        if "result" not in entry:
            outcome = (entry.get("skipped") or entry["error"]).strip().splitlines()[-1]
        print(f"{at:6.1f} s  {name:20} {seconds:6.1f} s  {outcome}")
    failed = [name for name, entry in stages.items() if "result" not in entry or "error" in entry]
    print(f"{took:6.1f} s  the end, exit status {run.returncode}, files: {files(folder / 'whole')}\n")
    if failed or run.returncode:
        print(f"FAILED: {failed} {run.stderr[-3000:]}")
    for i in range(kills):
        out, moment = folder / str(i), moments.uniform(0, took)
        what, broken = killed(out, moment)
        print(f"killed after {moment:5.1f} s: {what}")
        failed += [str(i)] if broken else []
    return 1 if failed or run.returncode else 0


def command(out: Path) -> list[str]:
    return [sys.executable, str(Path(__file__).resolve()), "--stand-in", "run", "--out", str(out)]


def killed(out: Path, moment: float) -> tuple[str, bool]:
    """What a run that is killed leaves, and whether it cannot be read."""
    with subprocess.Popen(command(out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            process.wait(moment)
        except subprocess.TimeoutExpired:
            process.kill()
    if not (out / "gpu.json").exists():
        return "before the first stage was done", False
    try:
        stages = json.loads((out / "gpu.json").read_text())["stages"]
    except ValueError as error:
        return f"gpu.json CANNOT BE READ: {error}", True
    return f"gpu.json has {len(stages)} stages, the last is {list(stages)[-1]}; {files(out)}", False


def files(out: Path) -> str:
    return ", ".join(sorted(path.name for path in out.iterdir()))


def stand_in(name: str, out: Path) -> int:
    """What a process of the run does: the run itself, or one of the programs that it starts."""
    import pytest

    import fake_gpu

    patch = pytest.MonkeyPatch()
    fake_gpu.FakeGpu().install(patch)
    if name == "memcheck":
        import memcheck

        memcheck.main("cpu")
        return 0
    if name.startswith("smoke"):
        return smoke(name.removeprefix("smoke-"), patch)
    return run(out, patch)


def smoke(engine: str, patch: Any) -> int:
    import gpu_smoke
    from danlu.backends import BACKENDS
    from emulated import emulated

    patch.setitem(BACKENDS, "cuda", emulated())
    for check in gpu_smoke.checks(engine, "cpu"):
        print(json.dumps(check), flush=True)
    return 0


def run(out: Path, patch: Any) -> int:
    import commands
    import fake_stages
    import gpu_background
    import gpu_ncu
    import gpu_plan
    import gpu_setup
    import gpu_stages
    import prebuilt

    fake_stages.shrink(patch)
    patch.setattr(gpu_plan, "SHARE", 0.0)  # a CPU has no bandwidth to reach
    patch.setattr(gpu_setup, "gpu_capability", lambda: "90")
    patch.setattr(prebuilt, "PREBUILT", ROOT / "python" / "danlu")  # its modules are for this interpreter
    patch.setattr(prebuilt, "why_not", lambda *_: None)
    known = gpu_background.command

    def program(name: str) -> tuple[Sequence[str | Path], float]:
        if name.startswith("smoke"):
            return [sys.executable, __file__, "--stand-in", name], 120.0
        return known(name) if name == "probe" else (["true"], 1.0)

    def limited(
        wanted: Sequence[str | Path], seconds: float, capture: bool = True, **env: str
    ) -> tuple[int | None, str]:
        if "gpu_tests.py" in str(wanted[1:2]):
            return commands.limited([*wanted, "-k", TESTS], seconds, capture, DANLU_GPU_TESTS="emulated")
        if "memcheck" in wanted:
            return commands.limited([sys.executable, __file__, "--stand-in", "memcheck"], seconds)
        return fake_stages.program(wanted)

    patch.setattr(gpu_background, "command", program)
    patch.setattr(gpu_stages, "limited", limited)
    patch.setattr(gpu_ncu, "limited", limited)
    fake_stages.install_tools(patch)
    try:
        gpu_setup.main(["--out", str(out)])
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
