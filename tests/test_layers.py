"""Nothing knows what lies above it: modules import without circles, kernels know no Python."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {"danlu": ROOT / "python/danlu", "danlu.triton_kernels": ROOT / "triton_kernels"}


def modules() -> dict[str, Path]:
    """Every module of the package by its name; of native modules their stubs."""
    found = {}
    for package, folder in PACKAGES.items():
        for path in sorted([*folder.rglob("*.pyi"), *folder.rglob("*.py")]):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join([package, *parts]).removesuffix(".__init__")] = path
    return found


def imported(name: str, path: Path, known: dict[str, Path]) -> Iterator[str]:
    """Modules that one names anywhere, in functions and for type checkers too."""
    package = name if path.stem == "__init__" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: package.count(".") + 2 - node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                if inner in known or base in known:
                    yield inner if inner in known else base


def graph(known: dict[str, Path]) -> dict[str, set[str]]:
    return {name: {*imported(name, path, known)} - {name} for name, path in known.items()}


def test_imports_have_no_circle() -> None:
    known = modules()
    edges = graph(known)
    assert len(known) > 50
    assert sum(map(len, edges.values())) > 200
    try:
        TopologicalSorter(edges).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


def test_circles_are_seen(tmp_path: Path) -> None:
    """Also those that exist for type checkers alone, or at a call."""
    (tmp_path / "a.py").write_text("if TYPE_CHECKING:\n    from . import b\n")
    (tmp_path / "b.py").write_text("def f():\n    from .a import x\n")
    (tmp_path / "c.py").write_text("import danlu.a\n")
    known = {f"danlu.{name}": tmp_path / f"{name}.py" for name in "abc"}
    edges = graph(known)
    assert edges == {"danlu.a": {"danlu.b"}, "danlu.b": {"danlu.a"}, "danlu.c": {"danlu.a"}}
    with pytest.raises(CycleError):
        TopologicalSorter(edges).prepare()


# what a layer may not import, by the first folder or module below `danlu`
ABOVE = {
    "schedule": {"backends", "plan", "optimizer", "optimizers", "wrappers", "triton_kernels", "spec"},
    "spec": {"backends", "plan", "optimizer", "optimizers", "wrappers", "triton_kernels"},
    "step_rule": {"backends", "plan", "optimizer", "optimizers", "wrappers", "triton_kernels", "spec"},
    "triton_kernels": {"backends", "plan", "optimizer", "optimizers", "wrappers", "spec", "step_rule"},
    "backends": {"plan", "optimizer", "optimizers", "wrappers", "checkpoint"},
    "plan": {"optimizer", "optimizers", "wrappers", "checkpoint"},
    "checkpoint": {"optimizer", "optimizers", "wrappers", "backends", "plan"},
    "update_rule": {"backends", "plan", "optimizer", "optimizers", "wrappers", "checkpoint"},
    "optimizer": {"optimizers", "wrappers"},
    "optimizers": {"wrappers"},
}


@pytest.mark.parametrize("layer", ABOVE)
def test_a_layer_knows_none_above_it(layer: str) -> None:
    edges = {name: targets for name, targets in graph(modules()).items() if _layer(name) == layer}
    assert edges
    wrong = {(name, t) for name, targets in edges.items() for t in targets if _layer(t) in ABOVE[layer]}
    assert not wrong


def _layer(name: str) -> str:
    return name.removeprefix("danlu.").split(".")[0]


KERNELS = ("common", "cpu", "cuda", "rules")
FOREIGN = re.compile(r'#include\s+[<"](?:pybind11/|Python\.h|torch/|ATen/|c10/)')


@pytest.mark.parametrize("folder", KERNELS)
def test_kernels_know_no_python(folder: str) -> None:
    """Nor do the headers that they include."""
    todo, seen = [path for path in (ROOT / "csrc" / folder).rglob("*") if path.is_file()], set()
    assert todo
    while todo:
        path = todo.pop()
        if path in seen:
            continue
        seen.add(path)
        text = path.read_text()
        assert not FOREIGN.search(text), path
        for name in re.findall(r'#include "([^"@]+)"', text):
            target = (path.parent / name).resolve()
            if target.exists():
                todo.append(target)
