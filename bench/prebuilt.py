"""Native modules built ahead, for a machine with a GPU whose time is short: `make prebuilt`.

    python3 bench/prebuilt.py            builds them in build/prebuilt, for CPython 3.12 and capability 9.0
    python3 bench/prebuilt.py --check    whether they serve this interpreter, and if not, why

A module serves one version of CPython and one processor architecture. Its glibc may not be newer than that
of the machine it is for. `bench/gpu.sh` checks all that, and that the sources are those the modules were
built from; where they cannot serve it says why and builds.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PREBUILT = ROOT / "build" / "prebuilt"
MODULES = ("_cpu", "_cuda")
VERSION = "3.12"
ARCHITECTURES = "90-real"
NEWEST_GLIBC = (2, 34)
LOOK = """
import os, sys, sysconfig
has_header = os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h"))
print("%d.%d" % sys.version_info[:2] if has_header and sys.implementation.name == "cpython" else "")
"""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="build nothing, look at what is there")
    parser.add_argument("--version", default=VERSION, help="of CPython (default: %(default)s)")
    parser.add_argument("--archs", default=ARCHITECTURES, help="as DANLU_CUDA_ARCHS (default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.check:
        reason = why_not(PREBUILT)
        print(reason or f"the modules in {PREBUILT} serve this interpreter")
        return 0 if reason is None else 1
    python, version = interpreter(options.version)
    if version != options.version:
        print(f"there is no CPython {options.version} with Python.h here; building for {version} instead")
    built = build(python, options.archs)
    print(
        f"{PREBUILT}: CPython {version}, compute capability {options.archs}, needs glibc {built['glibc']} "
        f"and GLIBCXX_{built['glibcxx']}; another version of CPython cannot load them"
    )
    if numbers(built["glibc"]) > NEWEST_GLIBC:
        wanted = ".".join(map(str, NEWEST_GLIBC))
        print(f"that is newer than glibc {wanted}: build on an older system", file=sys.stderr)
        return 1
    return 0


def interpreter(version: str) -> tuple[str, str]:
    """One of that version that has Python.h, else the one that runs this; and its version."""
    for python in candidates(version):
        run = subprocess.run([python, "-c", LOOK], capture_output=True, text=True)
        if run.returncode == 0 and run.stdout.strip() == version:
            return str(python), version
    return sys.executable, "{}.{}".format(*sys.version_info)


def candidates(version: str) -> Iterator[Path]:
    """On the path, and where pyenv keeps them."""
    for folder in os.environ.get("PATH", "").split(os.pathsep):
        yield from Path(folder or ".").glob(f"python{version}")
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    yield from sorted(pyenv.glob(f"versions/{version}.*/bin/python{version}"))


def build(python: str, architectures: str) -> dict[str, Any]:
    """What is written beside the modules."""
    import pybind11

    scripts = sysconfig.get_path("scripts")
    tools = {**os.environ, "PATH": os.pathsep.join([scripts, os.environ.get("PATH", "")])}
    ask = "import sys, sysconfig; print(sys.implementation.cache_tag, sysconfig.get_config_var('EXT_SUFFIX'))"
    tag, suffix = subprocess.check_output([python, "-c", ask], text=True).split()
    work = ROOT / "build" / f"prebuilt-{tag}"
    generator = ["-G", "Ninja"] if shutil.which("ninja", path=tools["PATH"]) else []
    configure = [
        f"-DPython_EXECUTABLE={python}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={work / 'modules'}",
        "-DDANLU_CUDA=1",
        f"-DDANLU_CUDA_ARCHS={architectures}",
    ]
    sources = digest()
    subprocess.run(["cmake", "-S", ROOT, "-B", work, *generator, *configure], check=True, env=tools)
    subprocess.run(["cmake", "--build", work, "--parallel"], check=True, env=tools)
    shutil.rmtree(PREBUILT, ignore_errors=True)
    PREBUILT.mkdir(parents=True)
    for module in MODULES:
        shutil.copy(work / "modules" / f"{module}{suffix}", PREBUILT)
    modules = [PREBUILT / f"{module}{suffix}" for module in MODULES]
    built = {
        "suffix": suffix,
        "architectures": architectures,
        "sources": sources,
        "glibc": newest("GLIBC", modules),
        "glibcxx": newest("GLIBCXX", modules),
    }
    (PREBUILT / "built.json").write_text(json.dumps(built, indent=1) + "\n")
    return built


def why_not(folder: Path, capability: str | None = None) -> str | None:
    """Why the modules of a folder cannot serve this interpreter here; None if they can.

    capability: of the GPU, as "90"; None does not look at it.
    """
    try:
        built = json.loads((folder / "built.json").read_text())
    except (OSError, ValueError):
        return f"there are no prebuilt modules in {folder}"
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    if built["suffix"] != suffix:
        return f"the prebuilt modules are for {built['suffix']}, this interpreter loads {suffix}"
    if built["sources"] != digest():
        return "the prebuilt modules are from other sources: run `make prebuilt` again"
    if capability is not None and not runs_on(built["architectures"], capability):
        return f"the prebuilt modules are for capability {built['architectures']}, the GPU has {capability}"
    # elsewhere: two copies of a module do not fit into one process
    script = f"import sys; sys.path.insert(0, sys.argv[1]); import {', '.join(MODULES)}"
    run = subprocess.run([sys.executable, "-c", script, folder], capture_output=True, text=True)
    if run.returncode:
        reason = [f"exit status {run.returncode}", *run.stderr.strip().splitlines()][-1]
        return f"the prebuilt modules cannot be loaded: {reason}"
    return None


def runs_on(architectures: str, capability: str) -> bool:
    """Real code of the same major version, not newer."""
    found = [re.match(r"(\d+)(\d)", name) for name in re.split("[;,]", architectures)]
    major, minor = capability[:-1], capability[-1]
    return any(m is not None and m[1] == major and m[2] <= minor for m in found)


def digest() -> str:
    """Of all that the modules are built from."""
    found = hashlib.sha256()
    paths = [ROOT / "CMakeLists.txt", *(p for p in (ROOT / "csrc").rglob("*") if p.is_file())]
    for path in sorted(paths):
        found.update(f"{path.relative_to(ROOT).as_posix()}\0".encode() + path.read_bytes() + b"\0")
    return found.hexdigest()


def newest(name: str, modules: Sequence[Path]) -> str:
    """The newest version of GLIBC or GLIBCXX that modules ask for, read in their string tables."""
    pattern = re.compile(rf"\0{name}_(\d+(?:\.\d+)+)(?=\0)".encode())
    found = [match.decode() for module in modules for match in pattern.findall(module.read_bytes())]
    return max(found, key=numbers, default="0")


def numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


if __name__ == "__main__":
    sys.exit(main())
