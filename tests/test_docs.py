"""What the documents say is run: code of README and pages, examples of docstrings, links."""

from __future__ import annotations

import ast
import doctest
import importlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed.tensor
from accelerate.state import AcceleratorState

import danlu
from oracles.submodules import ORACLES

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PUBLIC = [getattr(danlu, name) for name in danlu.__all__]


PAGES_WITH_CODE = ["options.md", "schedules.md", "wrappers.md"]


def blocks_of(document: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", document.read_text(), flags=re.DOTALL)


@pytest.fixture
def process_group() -> Iterator[None]:
    """Of this process alone."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


class Trainer:
    """In the place of transformers', whose package is installed without what it imports."""

    def __init__(self, **given: Any) -> None:
        module = ast.parse((ORACLES / "transformers" / "trainer.py").read_text())
        (cls,) = (node for node in module.body if isinstance(node, ast.ClassDef) and node.name == "Trainer")
        init = next(
            node for node in cls.body if isinstance(node, ast.FunctionDef) and node.name == "__init__"
        )
        assert given.keys() <= {argument.arg for argument in init.args.args}
        self.optimizer, _ = given["optimizers"]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_readme_code_runs(
    process_group: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    transformers = ModuleType("transformers")
    transformers.Trainer = Trainer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "transformers", transformers)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    swap, *recipes = blocks_of(ROOT / "README.md")
    names: dict[str, Any] = {"args": None, "data": None}
    exec(compile(swap, "README.md", "exec"), names)
    assert "native kernels" in capsys.readouterr().out
    assert isinstance(names["optimizer"], danlu.AdamW)
    assert len(recipes) == 4
    for recipe in recipes:
        exec(compile(recipe, "README.md", "exec"), names)
    AcceleratorState._reset_state(reset_partial_state=True)
    assert isinstance(names["trainer"].optimizer, danlu.AdamW)
    assert isinstance(names["Module"]().configure_optimizers(), danlu.AdamW)
    weight = names["model"].weight
    assert isinstance(weight, torch.distributed.tensor.DTensor)
    before = weight.full_tensor().clone()
    names["model"](torch.randn(2, 64)).sum().backward()
    names["optimizer"].step()
    assert not torch.equal(weight.full_tensor(), before)


@pytest.mark.parametrize("page", PAGES_WITH_CODE)
def test_code_of_pages_runs(page: str) -> None:
    names: dict[str, Any] = {}
    for block in blocks_of(ROOT / "docs" / page):
        exec(compile(block, page, "exec"), names)
    assert "danlu" in names


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = torch.nn.Sequential()
        self.mlp.add_module("up", torch.nn.Linear(8, 16))
        self.mlp.add_module("down", torch.nn.Linear(16, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mlp(x)


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_recipes_of_sharding(process_group: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = [
        re.sub(r'"cuda", \(\d+, \d+\)', '"cpu", (1, 1)', block)
        for block in blocks_of(ROOT / "docs" / "sharding.md")
    ]
    assert all('"cpu"' in block for block in blocks[:2])
    sharded, parallel, checkpoint = blocks
    names: dict[str, Any] = {}
    for recipe in (sharded, parallel):
        names["model"] = Model()
        exec(compile(recipe, "sharding.md", "exec"), names)
        weight = names["model"].layers[1].mlp.up.weight
        assert isinstance(weight, torch.distributed.tensor.DTensor)
        before = weight.full_tensor().clone()
        names["model"](torch.randn(2, 8)).sum().backward()
        names["optimizer"].step()
        assert not torch.equal(weight.full_tensor(), before)
    state = names["optimizer"].state[weight]
    exec(
        compile(checkpoint.replace("optimizer.zero_grad()", "wipe()"), "sharding.md", "exec"),
        names | {"wipe": lambda: [names["optimizer"].zero_grad(), state["row_var"].zero_()]},
    )
    assert (names["optimizer"].state[weight]["row_var"].full_tensor() != 0).all()


def test_no_page_has_code_that_is_not_run() -> None:
    with_code = {page.name for page in (ROOT / "docs").glob("*.md") if blocks_of(page)}
    assert with_code == {*PAGES_WITH_CODE, "custom_rules.md", "sharding.md"}


# a model's worth of steps with the page's own rule, interpreted and as reference
STEPS_OF_OWN_RULE = """
from danlu.testing import same_bits
results = []
for backend in ("triton", "reference"):
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(n)) for n in (3, 5000)]
    groups = [{"params": params[:1]}, {"params": params[1:], "lr": 0.1}]
    optimizer = CautiousMomentum(groups, weight_decay=0.1, backend=backend)
    for step in range(4):
        for p in params:
            p.grad = torch.randn(p.shape)
        optimizer.step()
    results += [params]
    print(optimizer.backend_report())
print(all(map(same_bits, *results)))
"""


def test_a_custom_rule(tmp_path: Path) -> None:
    (block,) = blocks_of(ROOT / "docs" / "custom_rules.md")  # its source has to be in a file
    assert sum(bool(line.strip()) for line in block.splitlines()) < 30
    file = tmp_path / "own_rule.py"
    file.write_text(block + STEPS_OF_OWN_RULE)
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run([sys.executable, file], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "triton " in run.stdout
    assert run.stdout.splitlines()[-1] == "True"


@pytest.mark.parametrize(
    "name",
    [
        *(f"optimizers.{name}" for name in ("lion", "tiger", "adam", "adax", "adafactor", "lamb", "amos")),
        "amos_groups",
        "amos_strategy",
        "param_groups",
        "piecewise_linear_lr",
        "relative_step_lr",
        "testing",
        "wrappers.layer_adaptation",
        "wrappers.lazy",
    ],
)
def test_docstring_examples_run(name: str) -> None:
    module = importlib.import_module(f"danlu.{name}")
    result = doctest.testmod(module, extraglobs={"danlu": danlu, "torch": torch})
    assert result.attempted > 0
    assert result.failed == 0


@pytest.mark.parametrize("thing", PUBLIC, ids=lambda t: t.__name__)
def test_public_docstrings_are_whole(thing: type) -> None:
    text = thing.__doc__ or ""
    if thing is danlu.FusedOptimizer:
        words = ["Keyword arguments", "Raises"]
    elif not isinstance(thing, type):
        words = ["Args:", "Raises:"]
    elif not issubclass(thing, danlu.FusedOptimizer):
        words = ["Args:", "Raises:", ">>>"]
    elif "Arguments, state and errors are" in text:
        words = [">>>", "arXiv"]
    else:
        words = ["Args:", "State per parameter", "Raises:", ">>>"]
    assert all(word in text for word in words)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: d.name)
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
        assert target.startswith("http") or (document.parent / target).exists(), target


def test_versions_agree() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    assert f'version = "{danlu.__version__}"' in project
    assert f"## {danlu.__version__}" in (ROOT / "CHANGELOG.md").read_text()
