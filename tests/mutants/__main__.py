"""Breaks the code on purpose, in one place at a time, and looks whether tests notice: `make mutants`.

    python tests/mutants                      all of tests/mutants/table.py
    python tests/mutants --only cuda          those whose name has that
    python tests/mutants --check              builds and runs nothing: is each old text in its file once?

Works on a copy in build/mutants, whose modules have a few of the rules: a changed header compiles in seconds.
Tests are first run over the copy as it is, where they must pass. The exit status is 1 if a mutant survives.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from pathlib import Path

from table import MUTANTS, Mutant

ROOT = Path(__file__).resolve().parent.parent.parent
COPY = ROOT / "build" / "mutants"
RULES = (
    *("lion", "tiger", "adamw", "accumulate", "average", "lookahead"),
    *("tiger_rows", "lamb", "adafactor_factored", "adafactor", "amos_rows"),
)
SECONDS = 600  # after which a run counts as one that hangs, and noticed


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python tests/mutants", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", metavar="TEXT", help="mutants whose name has it")
    parser.add_argument("--check", action="store_true", help="only look whether the table fits the sources")
    options = parser.parse_args(arguments)
    wrong = [text for mutant in MUTANTS if (text := why_not(mutant, ROOT))]
    if wrong:
        print("\n".join(wrong), file=sys.stderr)
        return 2
    chosen = [mutant for mutant in MUTANTS if options.only in mutant.name]
    if options.check or not chosen:
        print(f"{len(chosen)} mutants")
        return 0 if chosen else 2
    copy_tree()
    passing: set[tuple[str, ...]] = set()
    survivors = []
    for mutant in chosen:
        if mutant.tests not in passing:
            check_without(mutant.tests)
            passing.add(mutant.tests)
        if not killed(mutant):
            survivors.append(mutant.name)
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} killed")
    print("".join(f"survived: {name}\n" for name in survivors), end="")
    return 1 if survivors else 0


def why_not(mutant: Mutant, tree: Path) -> str | None:
    """Why it cannot be applied; None if it can."""
    path = tree / mutant.file
    found = path.read_text().count(mutant.old) if path.exists() else 0
    return None if found == 1 else f"{mutant.name}: {mutant.file} has {mutant.old!r} {found} times, not once"


def check_without(tests: Sequence[str]) -> None:
    """Tests that fail anyway would notice everything."""
    build()  # without the mutant before
    noticed, seconds, output = run_tests(tests)
    if noticed:
        raise SystemExit(f"{output}\n{' '.join(tests)} fails without a mutant")
    print(f"{seconds:6.1f} s  passes  {' '.join(tests)}", flush=True)


def killed(mutant: Mutant) -> bool:
    path = COPY / mutant.file
    text = path.read_text()
    path.write_text(text.replace(mutant.old, mutant.new))
    try:
        if mutant.file.startswith("csrc/"):
            build()
        noticed, seconds, output = run_tests(mutant.tests)
    finally:
        path.write_text(text)
    last = [line for line in output.splitlines() if re.match(r"(E  |FAILED|ERROR|error)", line)][:1]
    print(
        f"{seconds:6.1f} s  {'killed' if noticed else 'SURVIVED'}  {mutant.name}  {''.join(last)[:80]}",
        flush=True,
    )
    return noticed


def copy_tree() -> None:
    """The files that git knows, as they are now; those that are as before keep their time, so that nothing is
    built again. Beside them the built `_cuda`, whose machine code some tests read.
    """
    listed = subprocess.check_output(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, text=True)
    known = set(listed.splitlines())
    for path in [*COPY.rglob("*")] if COPY.exists() else []:
        relative = path.relative_to(COPY)
        ours = relative.parts[0] == "build" or path.suffix == ".so" or path.is_dir() or path.is_symlink()
        if not ours and relative.as_posix() not in known:
            path.unlink()
    for name in known:
        source, copy = ROOT / name, COPY / name
        if not source.exists():
            continue
        data = source.read_bytes()
        if name == "csrc/rules.h":
            data = "".join(filter(stays, data.decode().splitlines(keepends=True))).encode()
        if not copy.exists() or copy.read_bytes() != data:
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(data)
            shutil.copymode(source, copy)
    kernels = COPY / "python/danlu/triton_kernels"
    if not kernels.is_symlink():
        kernels.symlink_to(COPY / "triton_kernels")
    for module in (ROOT / "python/danlu").glob("_cuda.*.so"):
        shutil.copy2(module, COPY / "python/danlu")


def stays(line: str) -> bool:
    """Whether a line of csrc/rules.h is compiled here."""
    rule = re.match(r"(?:REDUCING_)?RULE\((\w+),", line)
    return rule is None or rule[1] in RULES


def run_tests(tests: Sequence[str]) -> tuple[bool, float, str]:
    """Whether something fails; seconds; what they print."""
    start = time.monotonic()
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--tb=line", *tests]
    interpreted = {"TRITON_INTERPRET": "1"} if tests[0].startswith("tests/interpreted") else {}
    env = {**environment(), **interpreted}
    try:
        run = subprocess.run(command, cwd=COPY, env=env, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return True, time.monotonic() - start, "error: hangs"
    if run.returncode > 1:  # less than 0: it crashed
        raise SystemExit(f"{' '.join(tests)}: exit status {run.returncode}\n{run.stdout}{run.stderr}")
    return run.returncode != 0, time.monotonic() - start, run.stdout + run.stderr


def build() -> None:
    """`_cpu` and the emulator; what does not compile is no mutant."""
    import pybind11

    folder = COPY / "build" / "cpu"
    configure = [
        *("cmake", "-S", str(COPY), "-B", str(folder), "-G", "Ninja", "-DDANLU_CUDA=0"),
        *(f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"),
        f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={COPY / 'python' / 'danlu'}",
    ]
    emulator = [sys.executable, "-c", "import emulated; emulated.built()"]
    for command in (configure, ["ninja", "-C", str(folder), "_cpu"], emulator):
        run = subprocess.run(command, cwd=COPY / "tests", env=environment(), capture_output=True, text=True)
        if run.returncode:
            raise SystemExit(f"{' '.join(command)}\n{run.stdout}{run.stderr}")


def environment() -> dict[str, str]:
    return {
        **os.environ,
        "PATH": os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")]),
        "PYTHONPATH": str(COPY / "python"),
        "PYTHONDONTWRITEBYTECODE": "1",  # code of a moment has the date of what it is instead of
        "OMP_WAIT_POLICY": "passive",
        "TRITON_CACHE_DIR": str(ROOT / "build" / "triton"),
    }


if __name__ == "__main__":
    sys.exit(main())
