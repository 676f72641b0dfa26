"""The code inside the built `danlu._cuda`: PTX, and machine code for each architecture."""

from __future__ import annotations

import atexit
import importlib.util
import re
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from .listing import Function, demangled, functions, tool


def library() -> Path | None:
    """The module's file; None where it is not built."""
    spec = importlib.util.find_spec("danlu._cuda")
    return Path(spec.origin) if spec is not None and spec.origin else None


@cache
def modules(library: Path) -> list[str]:
    """PTX of each file that nvcc compiled, as they were linked: the build embeds one for each."""
    return _output("-ptx", library).split("\n.version ")[1:]


@cache
def ptx(library: Path) -> dict[str, str]:
    """Each kernel's text by its `plain` name."""
    entries: dict[str, str] = {}
    for module in modules(library):
        _, *texts = module.split(".entry ")
        shared = "\n".join(re.findall(r"^\.shared .*", module, flags=re.MULTILINE))
        entries.update({text[: text.index("(")]: f"{shared}\n.entry {text}" for text in texts})
    return dict(zip(plain(list(entries)), entries.values(), strict=True))


@cache
def machine_code(library: Path, architecture: int) -> dict[str, Function]:
    """Each kernel's listing by its `plain` name."""
    listed = [function for cubin in cubins(library, architecture) for function in functions(cubin)]
    return dict(zip(plain([function.name for function in listed]), listed, strict=True))


@cache
def cubins(library: Path, architecture: int) -> list[Path]:
    """The object file of each for an architecture, extracted, as `modules` are ordered."""
    folder = Path(tempfile.mkdtemp(prefix="danlu-code-"))
    atexit.register(shutil.rmtree, folder)
    _output("-xelf", f"sm_{architecture}", library, folder=folder)
    return sorted(folder.glob("*.cubin"), key=lambda path: int(path.name.split(".")[-3]))  # numbered


@cache
def symbols(module: Path) -> dict[int, str]:
    """`plain` names of a module's functions by their places in its file."""
    listed = subprocess.run(["nm", module], capture_output=True, text=True, check=True).stdout
    found = re.findall(r"^([0-9a-f]+) [tT] (\S*_kernel\S*)$", listed, flags=re.MULTILINE)
    names = plain([name for _, name in found])
    at: dict[int, str] = {}
    for (place, _), name in zip(found, names, strict=True):
        assert at.setdefault(int(place, 16), name) == name, f"two kernels at {place}"
    return at


def plain(mangled: list[str]) -> list[str]:
    """Names that kernels have whatever compiler made them: demangled, without their parameters' types."""
    found = [_without_parameters(name.removeprefix("void ")) for name in demangled(mangled)]
    assert len(set(found)) == len(found), "kernels that differ in their parameters alone"
    return found


def _without_parameters(name: str) -> str:
    depth = 0
    for at in reversed(range(len(name))):
        depth += {")": 1, "(": -1}.get(name[at], 0)
        if depth == 0:
            return name[:at]
    raise ValueError(name)


def _output(*options: str | Path, folder: Path | None = None) -> str:
    command = [tool("cuobjdump"), *options]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder).stdout
