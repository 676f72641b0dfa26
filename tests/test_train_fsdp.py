"""The training benchmark on several processes: the losses of one, and runs that go on from a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import ranks
import text
import train
from danlu.testing import same_bits
from fsdp import ShardedRun

SMALL = [
    *("--steps", "6", "--evaluate-every", "2", "--accumulate", "2"),
    *("--layers", "2", "--width", "32", "--context", "16", "--batch", "4", "--held-out-windows", "8"),
]
LETTERS = torch.arange(256, dtype=torch.uint8).repeat(9)


def test_losses_are_those_of_one_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["adamw", "adafactor", "lion+lookahead"]
    found, weights = {}, {}
    for kind, more in (("whole", []), ("sharded", ["--fsdp", "2"])):
        out = tmp_path / kind
        unfinished = ("--checkpoint", str(out / "unfinished"))
        options = [*SMALL, *more, "--optimizers", ",".join(names), "--save-weights", "--out", str(out)]
        train.main([*options, *unfinished])
        assert not list((out / "unfinished").iterdir())
        results = json.loads((out / "train.json").read_text())
        found[kind] = {run["name"]: run for run in results["runs"]}
        weights[kind] = {name: torch.load(out / f"{name}.pt") for name in names}
    assert results["settings"]["fsdp"] == 2
    for name in names:
        one, two = found["whole"][name], found["sharded"][name]
        assert one["curve"]["step"] == two["curve"]["step"] == [0, 2, 4, 6]
        losses = one["curve"]["held_out_loss"]
        assert losses[-1] < losses[0] - 0.02
        assert two["curve"]["held_out_loss"] == pytest.approx(losses, rel=1e-6)
        assert two["state_bytes_per_parameter"] == one["state_bytes_per_parameter"]
        torch.testing.assert_close(weights["sharded"][name], weights["whole"][name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "names",
    [
        ["adamw+lookahead", "adafactor"],
        pytest.param(
            ["tiger", "lamb", "amos", "lion+ema+accumulation", "adax+layer", "torch-adamw"],
            marks=pytest.mark.full,
        ),
    ],
    ids=",".join,
)
def test_one_that_ends_early_goes_on_to_the_same_bits(names: list[str], tmp_path: Path) -> None:
    ranks.run_on(2, end_early_and_go_on, names, tmp_path)


def end_early_and_go_on(names: list[str], folder: Path) -> None:
    _, settings, recipes = train.parse([*SMALL, "--fsdp", "2", "--optimizers", ",".join(names)])
    corpus = text.Corpus(LETTERS, LETTERS, "")
    for name, recipe in recipes.items():
        whole, ending, resumed = (ShardedRun(name, recipe, settings, corpus) for _ in range(3))
        whole.train(folder / f"{name}-whole.pt", lambda _: None)

        def end(run: Any) -> None:
            if run.step == 5:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            ending.train(folder / f"{name}.pt", end)
        resumed.load_state_dict(torch.load(folder / f"{name}.pt", weights_only=True))
        assert resumed.step == 4
        resumed.train(folder / f"{name}.pt", lambda _: None)
        for axis in ("step", "held_out_loss"):
            assert resumed.curve[axis] == whole.curve[axis], name
        found, wanted = resumed.weights(), whole.weights()
        assert found.keys() == wanted.keys()
        assert all(same_bits(found[key], wanted[key]) for key in wanted), name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--fsdp", "3"], "--batch 8: must be a multiple of --fsdp 3"),
        (["--fsdp", "3", "--batch", "6"], "--held-out-windows 128: must be a multiple of --fsdp 3"),
        (["--fsdp", "0"], "must be at least 1, got 0"),
        (["--fsdp", "2", "--device", "meta"], "--fsdp: runs on the CPU only, got --device meta"),
    ],
    ids=str,
)
def test_what_is_not_supported_is_named(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        train.parse(arguments)
    assert message in capsys.readouterr().err
