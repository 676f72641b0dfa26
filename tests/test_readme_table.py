"""README's tables are what the code says: support by asking it, defaults by its signatures."""

from __future__ import annotations

import ast
import inspect
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import danlu
import support_table
from emulated import AVAILABLE

README = (Path(__file__).resolve().parent.parent / "README.md").read_text()


@pytest.mark.skipif(not AVAILABLE, reason="the emulator switches stacks in x86-64 assembly")
def test_support() -> None:
    pytest.importorskip("triton")
    assert support_table.markdown() in README


def test_every_optimizer_has_its_row() -> None:
    names = [name for name, _ in support_table.rows()]
    public = {n for n in danlu.__all__ if isinstance(getattr(danlu, n), type)} - {"FusedOptimizer"}
    optimizers = {n for n in public if issubclass(getattr(danlu, n), torch.optim.Optimizer)}
    assert {name.removesuffix("(AdamW)") for name in names} == optimizers
    listed = {name: cells for name, *cells in rows_of("Optimizers")}
    assert listed.keys() == {name for name in names if not name.endswith(")")}


def test_defaults() -> None:
    for name, _, defaults, *_ in rows_of("Optimizers"):
        parameters = inspect.signature(getattr(danlu, name)).parameters
        said = re.findall(r"(\w+) (\([^)]*\)|\"\w+\"|[\d.e-]+)", defaults)
        assert said, name
        for key, value in said:
            assert parameters[key].default == ast.literal_eval(value), (name, key)


def test_state() -> None:
    for name, state, *_ in rows_of("Optimizers"):
        p = torch.nn.Parameter(torch.zeros(2000, 1000))
        optimizer: Any = getattr(danlu, name)([p], lr=1e-3)
        optimizer.make_state()
        held = sum(x.nbytes for x in optimizer.state[p].values()) / p.numel()
        number = float(state.split()[-2])
        assert held <= number if number < 1 else held == pytest.approx(number, rel=1e-3), name


def test_figures() -> None:
    """Those that change when somebody measures again."""
    results = Path(support_table.__file__).resolve().parent.parent / "bench" / "results"
    measured = json.loads((results / "step_time.json").read_text())["workloads"]
    gpt2, many = ({row["name"]: row for row in of["contenders"]} for of in measured[:2])
    adafactor = next(pair["ratio"]["median"] for pair in measured[0]["pairs"] if pair["name"] == "adafactor")
    wrappers = json.loads((results / "wrappers.json").read_text())
    passes = {
        row["name"]: f"{row['share_of_adamw']['median']:.0%}" for row in wrappers["workloads"][0]["passes"]
    }
    ways = {(way["optimizer"], way["step"]): way["ratio"]["median"] for way in wrappers["lazy_rows"]["ways"]}
    for said in (
        f"is {adafactor:.1f} times as fast as torch's",
        f"takes {1 / gpt2['adamw']['ratio']['median']:.2f} times as long as torch's fused AdamW",
        f"takes {many['adamw']['ms']['median']:.1f} ms",
        f"takes {many['torch-adamw']['ms']['median']:.1f} ms",
        f"allocates {gpt2['adamw']['peak_extra_bytes']} bytes",
        f"allocates {gpt2['torch-adamw-foreach']['peak_extra_bytes'] / 1e6:.0f} MB",
        f"take {4 + gpt2['lion-bf16']['state_bytes_per_parameter']:.0f} bytes a parameter",
        f"{8 + gpt2['adamw']['state_bytes_per_parameter']:.0f} with AdamW in fp32",
        f"{passes['ema'][:-1]}, {passes['accumulation'][:-1]} and {passes['lookahead']} of an AdamW step",
        f"rows {math.floor(ways['AdamW', 'rows, listed in no order'])} times as fast as all",
    ):
        assert said in " ".join(README.split()), said


def test_it_is_short() -> None:
    assert len(README.splitlines()) <= 200
    prose = re.sub(r"```.*?```|^(?:\||#|    ).*?$", "", README, flags=re.DOTALL | re.MULTILINE)
    sentences = re.split(r"[.?!][*\s]|\n\s*(?:\n|[->])", re.sub(r"`.*?`|\]\(.*?\)", "word", prose))
    words = [len(sentence.split()) for sentence in sentences if sentence.strip()]
    assert sum(words) / len(words) <= 20


def rows_of(section: str) -> list[list[str]]:
    text = README.split(f"## {section}\n")[1].split("\n## ")[0]
    return [
        [cell.strip(" `") for cell in line.split(" | ")] for line in re.findall(r"^\| (`.*) \|$", text, re.M)
    ]
