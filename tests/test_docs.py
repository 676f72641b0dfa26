"""What the documents say is run: code of README, examples of docstrings, links."""

from __future__ import annotations

import doctest
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import danlu

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PUBLIC = [getattr(danlu, name) for name in danlu.__all__]


def test_readme_code_runs(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert len(blocks) >= 3
    blocks = [block for block in blocks if "@triton.jit" not in block]  # their source has to be in a file
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert "native kernels" in capsys.readouterr().out
    assert isinstance(names["optimizer"], danlu.AdamW)


# a model's worth of steps with the README's own rule, interpreted and as reference
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


def test_the_readmes_own_rule(tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    (block,) = (block for block in blocks if "@triton.jit" in block)
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
