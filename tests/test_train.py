"""The training benchmark: real text split by file, learning, and runs that survive being killed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import text
import train
from danlu.testing import same_bits

BENCH = Path(train.__file__).parent
NAMES = ["lion", "tiger", "adaxw"]
SMALL = [
    *("--steps", "24", "--evaluate-every", "4", "--optimizers", ",".join(NAMES), "--accumulate", "2"),
    *("--layers", "1", "--width", "32", "--context", "16", "--batch", "4", "--held-out-windows", "8"),
]

# the program, which dies after a step that is no checkpoint, without a chance to clean up
KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv.pop(1))
import train

def advance(run, advance=train.Run.advance):
    advance(run)
    if (run.name, run.step) == ("tiger", 14):
        os.kill(os.getpid(), signal.SIGKILL)

train.Run.advance = advance
train.main(sys.argv[1:])
"""


def options(folder: Path, *more: str) -> list[str]:
    return [*SMALL, "--save-weights", "--out", str(folder), "--checkpoint", str(folder / "unfinished"), *more]


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *command], capture_output=True, text=True)


def results(folder: Path) -> dict[str, Any]:
    runs = json.loads((folder / "train.json").read_text())["runs"]
    return {run["name"]: run for run in runs}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run from beginning to end."""
    folder = tmp_path_factory.mktemp("whole")
    done = run(str(BENCH / "train.py"), *options(folder))
    assert done.returncode == 0, done.stderr
    assert not list((folder / "unfinished").iterdir())
    assert "held-out" in done.stdout
    return folder


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was killed, to be copied."""
    folder = tmp_path_factory.mktemp("killed")
    died = run("-c", KILLED, str(BENCH), *options(folder))
    assert died.returncode == -9, died.stderr
    assert [path.name for path in folder.iterdir()] == ["unfinished"]
    assert len(list((folder / "unfinished").iterdir())) == 2
    return folder


def test_killed_and_started_again_it_goes_on_to_the_same_bits(
    whole: Path, killed: Path, tmp_path: Path
) -> None:
    shutil.copytree(killed, tmp_path, dirs_exist_ok=True)
    again = run(str(BENCH / "train.py"), *options(tmp_path))
    assert again.returncode == 0, again.stderr
    assert "lion goes on from step 24" in again.stdout
    assert "tiger goes on from step 12" in again.stdout
    assert "adaxw goes on" not in again.stdout
    for name, run_ in results(tmp_path).items():
        expected = results(whole)[name]
        for axis in ("step", "held_out_loss"):
            assert run_["curve"][axis] == expected["curve"][axis]
        weights, expected_weights = (torch.load(folder / f"{name}.pt") for folder in (tmp_path, whole))
        assert all(same_bits(weights[key], p) for key, p in expected_weights.items())


def test_other_options_start_anew(killed: Path, tmp_path: Path) -> None:
    shutil.copytree(killed, tmp_path, dirs_exist_ok=True)
    other = run(str(BENCH / "train.py"), *options(tmp_path, "--seed", "1", "--optimizers", "tiger"))
    assert other.returncode == 0, other.stderr
    assert "goes on" not in other.stdout


def test_it_learns(whole: Path) -> None:
    for run_ in results(whole).values():
        losses = run_["curve"]["held_out_loss"]
        assert run_["curve"]["step"] == [0, 4, 8, 12, 16, 20, 24]
        assert losses[0] == pytest.approx(5.5, abs=0.2)  # log(256) = 5.55: it knows nothing
        assert losses[-1] < losses[0] - 0.05
        assert 0 < run_["optimizer_seconds"] < run_["seconds"]
    assert (whole / "train.png").stat().st_size > 0


def test_accumulation_needs_no_sum_of_gradients_with_tiger() -> None:
    """Which takes the parts of a batch one by one, and moves as often as the others."""
    _, settings, recipes = train.parse(options(Path("unused")))
    corpus = text.Corpus(torch.arange(256, dtype=torch.uint8).repeat(9), torch.zeros(99).byte(), "")
    for name, recipe in recipes.items():
        run_ = train.Run(name, recipe, settings, corpus)
        calls = []
        run_.optimizer.register_step_post_hook(lambda *_, calls=calls: calls.append(1))
        run_.advance()
        assert len(calls) == (2 if name == "tiger" else 1)
        assert {s["step"].item() for s in run_.optimizer.state.values()} == {1.0}


def test_accumulated_gradients_are_those_of_the_whole_batch() -> None:
    _, settings, recipes = train.parse(options(Path("unused")))
    letters = torch.randint(256, (999,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    run_ = train.Run("lion", recipes["lion"], settings, text.Corpus(letters, letters, ""))
    batches = text.Batches(letters, settings.batch, settings.context, settings.seed)
    whole_batch = torch.cat([batches.next() for _ in range(settings.accumulate)])
    params = list(run_.model.parameters())
    expected = torch.autograd.grad(run_.model.loss(whole_batch), params)
    given: list[torch.Tensor] = []
    run_.optimizer.register_step_pre_hook(lambda *_: given.extend(p.grad.clone() for p in params))
    run_.advance()
    torch.testing.assert_close(given, list(expected))


def write(root: Path, names: list[str]) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"<{name}>")


def test_files_are_held_out_whole(tmp_path: Path) -> None:
    names = [f"package/module{i}.py" for i in range(100)]
    write(tmp_path, [*names, "test/test_it.py", "site-packages/other.py", "package/data.txt"])
    corpus = text.load_corpus(tmp_path)
    train_text, held_out = (bytes(part.tolist()) for part in (corpus.train, corpus.held_out))
    for name in names:
        is_here = [f"<{name}>".encode() in part for part in (train_text, held_out)]
        assert is_here == [not text.is_held_out(name), text.is_held_out(name)]
    assert 3 <= held_out.count(b"<") <= 25
    assert train_text.count(b"<") + held_out.count(b"<") == 100
    chosen = [name for name in names if text.is_held_out(name)]
    write(tmp_path, ["package/a_new_one.py"])
    assert [name for name in names if text.is_held_out(name)] == chosen
    assert text.load_corpus(tmp_path).digest != corpus.digest


def test_too_little_text_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="must hold Python source files"):
        text.load_corpus(tmp_path)


def test_batches_can_be_repeated() -> None:
    source = torch.arange(200, dtype=torch.uint8)
    batches = text.Batches(source, batch=5, context=7, seed=3)
    batches.next()
    saved = batches.state_dict()
    wanted = batches.next()
    assert wanted.shape == (5, 8)
    assert (wanted.diff(dim=1) == 1).all()
    other = text.Batches(source, batch=5, context=7, seed=4)
    other.load_state_dict(saved)
    assert torch.equal(other.next(), wanted)


def test_schedule() -> None:
    factors = [train.warm_up_and_cosine(step, steps=100) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9] == factors[10] == 1
    assert factors == sorted(factors[:10]) + sorted(factors[10:], reverse=True)
    assert 0 < factors[-1] < 0.01


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--optimizers", "lion,sgd"], "--optimizers must name some of"),
        (["--lr", "lion=fast"], "--lr must end in =NUMBER"),
        (["--lr", "sgd=1"], "--lr must name one of"),
        (["--width", "33"], "--width must be a multiple of 32"),
        (["--steps", "0"], "must be at least 1, got 0"),
        (["--device", "nowhere"], "--device nowhere cannot be used"),
    ],
    ids=str,
)
def test_wrong_options_are_named(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        train.parse(arguments)
    assert message in capsys.readouterr().err
