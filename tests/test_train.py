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

import danlu
import recipes
import text
import train
import train_report
import training_run
from danlu.testing import same_bits

BENCH = Path(train.__file__).parent
NAMES = ["lion", "tiger", "adaxw", "adamw+lookahead", "lion+lookahead+ema+accumulation"]
SMALL = [
    *("--steps", "24", "--evaluate-every", "4", "--optimizers", ",".join(NAMES), "--accumulate", "2"),
    *("--layers", "1", "--width", "32", "--context", "16", "--batch", "4", "--held-out-windows", "8"),
]

# the program, which dies after a step that is no checkpoint, without a chance to clean up
KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv.pop(1))
import train
import training_run

def advance(run, advance=training_run.Run.advance):
    advance(run)
    if (run.name, run.step) == ("tiger", 14):
        os.kill(os.getpid(), signal.SIGKILL)

training_run.Run.advance = advance
train.main(sys.argv[1:])
"""


def options(folder: Path, *more: str) -> list[str]:
    return [*SMALL, "--save-weights", "--out", str(folder), "--checkpoint", str(folder / "unfinished"), *more]


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *command], capture_output=True, text=True)


def results(folder: Path) -> dict[str, Any]:
    runs = json.loads((folder / "train.json").read_text())["runs"]
    return {run["name"]: run for run in runs}


LETTERS = torch.arange(256, dtype=torch.uint8).repeat(9)


def small_run(name: str, *more: str, letters: torch.Tensor = LETTERS) -> training_run.Run:
    """A run in this process, that has not begun, on the same letters for training and evaluation."""
    _, settings, found = train.parse([*SMALL, "--optimizers", name, *more])
    return training_run.Run(name, found[name], settings, text.Corpus(letters, letters, ""))


def weights(run_: training_run.Run) -> list[torch.Tensor]:
    return [p.detach().clone() for p in run_.model.parameters()]


def held_out_loss(run_: training_run.Run) -> float:
    run_.evaluate()
    return run_.curve["held_out_loss"][-1]


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


def as_a_program(whole: Path, *arguments: str) -> None:
    """In this process, whose threads are part of what a checkpoint is for."""
    environment = json.loads((whole / "train.json").read_text())["environment"]
    torch.set_num_threads(environment["threads"])
    train.main(arguments)


def test_killed_and_started_again_it_goes_on_to_the_same_bits(
    whole: Path, killed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(killed, tmp_path, dirs_exist_ok=True)
    as_a_program(whole, *options(tmp_path))
    out = " ".join(capsys.readouterr().out.split())  # lines end at the terminal's width
    assert "lion goes on from step 24" in out
    assert "tiger goes on from step 12" in out
    assert "adaxw goes on" not in out
    for name, run_ in results(tmp_path).items():
        expected = results(whole)[name]
        for axis in ("step", "held_out_loss"):
            assert run_["curve"][axis] == expected["curve"][axis]
        # also of one that had come to its end
        assert run_["state_bytes_per_parameter"] == expected["state_bytes_per_parameter"] > 4
        found, wanted = (torch.load(folder / f"{name}.pt") for folder in (tmp_path, whole))
        assert all(same_bits(found[key], p) for key, p in wanted.items())


@pytest.mark.parametrize(
    "name",
    [
        *("adamw+lookahead", "adamw+lazy", "adafactor", "adax+lazy+lookahead+ema+accumulation"),
        *(
            pytest.param(name, marks=pytest.mark.full)
            for name in (
                *("adamw+ema", "adamw+accumulation", "adamw+layer", "lion+ema+lookahead"),
                *("torch-adamw+lookahead+ema", "amos"),
            )
        ),
    ],
)
def test_one_that_dies_within_a_cycle_goes_on_to_the_same_bits(name: str, tmp_path: Path) -> None:
    """Neither step 14 nor step 12, the checkpoint, ends a cycle of Lookahead."""
    more = ("--untied", "--schedule", "linear", "--evaluate-every", "12")
    whole, dying, resumed = (small_run(name, *more) for _ in range(3))
    whole.train(tmp_path / "whole.pt", lambda _: None)

    batches, parts_made = dying.batches.next, []

    def next_or_die() -> torch.Tensor:
        if len(parts_made) == 2 * 14 + 1:
            raise KeyboardInterrupt
        parts_made.append(1)
        return batches()

    dying.batches.next = next_or_die  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        dying.train(tmp_path / "dead.pt", lambda _: None)
    resumed.load_state_dict(torch.load(tmp_path / "dead.pt", weights_only=True))
    assert resumed.step == 12
    resumed.train(tmp_path / "dead.pt", lambda _: None)

    for axis in ("step", "held_out_loss"):
        assert resumed.curve[axis] == whole.curve[axis]
    assert all(map(same_bits, weights(resumed), weights(whole)))


def test_saved_weights_are_those_that_were_evaluated(whole: Path) -> None:
    _, settings, _ = train.parse(options(whole))
    windows = text.even_windows(text.load_corpus().held_out, settings.held_out_windows, settings.context)
    for name, run_ in results(whole).items():
        model = training_run.make_model(settings)
        model.load_state_dict(torch.load(whole / f"{name}.pt"))
        assert model.loss(windows).item() == pytest.approx(run_["held_out_loss"], abs=1e-5), name


def test_other_options_start_anew(
    whole: Path, killed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(killed, tmp_path, dirs_exist_ok=True)
    as_a_program(whole, *options(tmp_path, "--seed", "1", "--optimizers", "tiger"))
    assert "goes on" not in capsys.readouterr().out


def test_it_learns(whole: Path) -> None:
    for run_ in results(whole).values():
        losses = run_["curve"]["held_out_loss"]
        assert run_["curve"]["step"] == [0, 4, 8, 12, 16, 20, 24]
        assert losses[0] == pytest.approx(5.5, abs=0.2)  # log(256) = 5.55: it knows nothing
        assert losses[-1] < losses[0] - (0.05 if "+" not in run_["name"] else 0.02)
        assert 0 < run_["optimizer_seconds"] < run_["seconds"]
    assert (whole / "train.png").stat().st_size > 0


@pytest.mark.parametrize(
    ("name", "calls_a_step"),
    [("lion", 1), ("tiger", 2), ("adaxw", 1), ("tiger+ema", 1), ("tiger+accumulation", 2)],
)
def test_accumulation_needs_no_sum_of_gradients(name: str, calls_a_step: int) -> None:
    """Tiger and accumulation take the parts of a batch one by one, and move as often as the others."""
    run_ = small_run(name)
    calls = []
    run_.optimizer.register_step_post_hook(lambda *_: calls.append(1))
    run_.advance()
    assert len(calls) == calls_a_step
    assert {s["step"].item() for s in run_.optimizer.state.values()} == {1.0}


@pytest.mark.parametrize("name", ["lion", "lion+accumulation", "lion+lookahead+ema+accumulation"])
def test_accumulated_gradients_are_those_of_the_whole_batch(name: str) -> None:
    letters = torch.randint(256, (999,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    run_ = small_run(name, letters=letters)
    settings = run_.settings
    batches = text.Batches(letters, settings.batch, settings.context, settings.seed)
    whole_batch = torch.cat([batches.next() for _ in range(settings.accumulate)])
    params = list(run_.model.parameters())
    expected = torch.autograd.grad(run_.model.loss(whole_batch), params)
    given: list[torch.Tensor] = []
    *_, innermost = recipes.from_outside(run_.optimizer)
    innermost.register_step_pre_hook(lambda *_: given.extend(p.grad.clone() for p in params))
    run_.advance()
    torch.testing.assert_close(given, list(expected))


def test_wrappers_nest_from_the_inside_with_the_settings_of_options() -> None:
    more = ("--untied", "--lookahead-k", "3", "--lookahead-alpha", "0.25", "--ema-decay", "0.9")
    run_ = small_run("adax+lazy+lookahead+ema+accumulation", *more)
    found = list(recipes.from_outside(run_.optimizer))
    kinds = [danlu.GradientAccumulation, danlu.EMA, danlu.Lookahead, danlu.Lazy, danlu.AdaX]
    assert [type(one) for one in found] == kinds
    accumulation, ema, lookahead, lazy, _ = found
    assert (accumulation.steps, ema.decay, lookahead.k, lookahead.alpha) == (2, 0.9, 3, 0.25)
    assert lazy.mode == "rows"
    run_.advance()
    run_.evaluate()
    assert run_.result()["wrappers"] == [
        {"name": "lazy", "mode": "rows"},
        {"name": "lookahead", "k": 3, "alpha": 0.25},
        {"name": "ema", "decay": 0.9},
        {"name": "accumulation", "steps": 2},
    ]
    # two moments, slow weights, averages and means of gradients, besides counters
    assert 20 <= run_.result()["state_bytes_per_parameter"] < 20.05


def test_layer_adaptation_has_an_lr_of_its_own() -> None:
    adapted = small_run("lion+layer+ema")
    assert isinstance(adapted.optimizer.optimizer, danlu.LayerAdaptation)
    assert adapted.recipe.lr == small_run("adamw+layer").recipe.lr != small_run("lion").recipe.lr
    assert small_run("lion+layer", "--lr", "lion+layer=0.5").recipe.lr == 0.5


def averages(seen: list[list[torch.Tensor]], decay: float) -> list[torch.Tensor]:
    """Of the weights after each step, with the weights of a debiased exponential average."""
    parts = torch.tensor([decay ** (len(seen) - 1 - i) for i in range(len(seen))], dtype=torch.float64)
    parts /= parts.sum()
    return [
        sum(part * p.double() for part, p in zip(parts, ps, strict=True)) for ps in zip(*seen, strict=True)
    ]


@pytest.mark.parametrize(
    ("name", "shipped"),
    [
        ("adamw", "fast"),
        ("adamw+layer", "fast"),
        ("adamw+ema", "averages"),
        ("adamw+lookahead", "slow"),
        ("adamw+lookahead+ema+accumulation", "averages"),
        ("adamw+ema+lookahead", "slow"),
    ],
)
def test_what_a_user_would_ship_is_evaluated(name: str, shipped: str) -> None:
    run_ = small_run(name, "--lookahead-k", "5", "--ema-decay", "0.9")
    first = weights(run_)
    at_first = held_out_loss(run_)
    seen = []
    for _ in range(4):
        run_.advance()
        seen.append(weights(run_))
    losses = {}
    wanted = {"fast": seen[-1], "slow": first, "averages": averages(seen, 0.9)}
    plain = training_run.make_model(run_.settings)
    for kind, values in wanted.items():
        with torch.no_grad():
            for p, value in zip(plain.parameters(), values, strict=True):
                p.copy_(value)
            losses[kind] = sum(plain.loss(part).item() for part in run_.held_out.split(4)) / 2
    assert len({round(loss, 3) for loss in losses.values()}) == 3  # they can be told apart
    assert held_out_loss(run_) == pytest.approx(losses[shipped], abs=1e-5)
    assert all(map(same_bits, weights(run_), seen[-1]))  # training goes on with its own
    if shipped == "slow":
        assert run_.curve["held_out_loss"] == [at_first, at_first]


@pytest.mark.parametrize("name", ["adamw", "adamw+lazy"])
def test_absent_rows_of_the_embedding_wait_with_lazy(name: str) -> None:
    few = torch.arange(40, dtype=torch.uint8).repeat(20)
    run_ = small_run(name, "--untied", letters=few)
    embedding, head = run_.model.embedding.weight, run_.model.head.weight
    before = embedding.detach().clone(), head.detach().clone()
    run_.advance()
    moved, of_head = ((p != old).any(dim=1) for p, old in zip((embedding, head), before, strict=True))
    assert moved[:40].all()
    assert moved[40:].any() == moved[40:].all() == (name == "adamw")
    assert of_head.all()
    lazy = [p for group in run_.optimizer.param_groups for p in group["params"] if group.get("lazy")]
    assert [p is embedding for p in lazy] == [True] * (name == "adamw+lazy")


def test_an_untied_head_is_part_of_the_model() -> None:
    tied, untied = small_run("lion"), small_run("lion", "--untied")
    assert tied.model.head is None
    sizes = [sum(p.numel() for p in run_.model.parameters()) for run_ in (tied, untied)]
    assert sizes[1] - sizes[0] == 256 * 32
    assert untied.model.head.weight.std().item() == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_every_recipe_learns(name: str) -> None:
    run_ = small_run(name)
    at_first = held_out_loss(run_)
    for _ in range(24):
        run_.advance()
    assert held_out_loss(run_) < at_first - 0.05


@pytest.mark.parametrize("name", [name for name in recipes.RECIPES if name != "amos"])
def test_decay_is_for_matrices(name: str) -> None:
    run_ = small_run(name, "--untied")
    decay = {p: group["weight_decay"] for group in run_.optimizer.param_groups for p in group["params"]}
    assert decay == {p: run_.recipe.weight_decay if p.ndim > 1 else 0.0 for p in run_.model.parameters()}


def test_amos_knows_the_kinds_of_parameters() -> None:
    run_ = small_run("amos")
    eta = {name: g["eta"] for g in run_.optimizer.param_groups for name in g["param_names"]}
    assert eta["blocks.0.expand.weight"] == pytest.approx((1 / 32) ** 0.5)
    assert eta["blocks.0.contract.weight"] == pytest.approx((2 / 128) ** 0.5)
    assert eta["embedding.weight"] == pytest.approx((2 / 32) ** 0.5)


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
    factors = [training_run.warm_up_and_cosine(step, steps=100) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9] == factors[10] == 1
    assert factors == sorted(factors[:10]) + sorted(factors[10:], reverse=True)
    assert 0 < factors[-1] < 0.01


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_both_schedules_warm_up_and_fall_to_nothing(schedule: str) -> None:
    run_ = small_run("lion+ema", "--schedule", schedule, "--steps", "20")
    factors = []
    for _ in range(20):
        factors.append(run_.optimizer.param_groups[0]["lr"] / 3e-4)
        run_.advance()
    assert run_.optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-12)
    assert factors[:2] == pytest.approx([0.5, 1.0])
    down = torch.linspace(0, 1, 19, dtype=torch.float64)[:-1]
    wanted = 1 - down if schedule == "linear" else 0.5 + 0.5 * torch.cos(torch.pi * down)
    assert factors[2:] == pytest.approx(wanted.tolist())


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize(("steps", "first"), [(1, [1.0]), (2, [1.0, 1.0]), (15, [0.5, 1.0, 1.0])])
def test_schedules_of_few_steps(steps: int, first: list[float], schedule: str) -> None:
    run_ = small_run("lion", "--schedule", schedule, "--steps", str(steps))
    factors = []
    for _ in range(steps):
        factors.append(run_.optimizer.param_groups[0]["lr"] / 3e-4)
        run_.optimizer.step()
        run_.scheduler.step()
    assert factors[: len(first)] == pytest.approx(first)
    assert all(0 < factor < 1 for factor in factors[len(first) :])


RUN_OF = {
    "danlu.Lion": ("danlu.optimizers.lion.Lion", []),
    "EMA(danlu.Lion)": ("danlu.optimizers.lion.Lion", ["ema"]),
    "torch.optim.AdamW": ("torch.optim.adamw.AdamW", []),
    "EMA(Lookahead(torch.optim.AdamW))": ("torch.optim.adamw.AdamW", ["lookahead", "ema"]),
}


@pytest.mark.parametrize(
    ("panels", "labels"),
    [
        ({"": ["danlu.Lion", "torch.optim.AdamW"]}, ["training time (s)", "steps"]),
        (
            {
                "danlu.Lion": ["danlu.Lion", "EMA(danlu.Lion)"],
                "torch.optim.AdamW": ["torch.optim.AdamW", "EMA(Lookahead(torch.optim.AdamW))"],
            },
            ["steps", "steps"],
        ),
    ],
)
def test_wrappers_are_compared_by_steps(
    panels: dict[str, list[str]], labels: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = []
    monkeypatch.setattr(train_report.pyplot, "close", shown.append)
    runs = [
        {
            "optimizer": RUN_OF[name][0],
            "wrappers": [{"name": wrapper} for wrapper in RUN_OF[name][1]],
            "curve": {"step": [0, 1], "seconds": [0.0, 2.0], "held_out_loss": [5.0, 4.0]},
        }
        for names in panels.values()
        for name in names
    ]
    environment = {"device": "it", "threads": 1, "torch": "2"}
    made = {"runs": runs, "parameters": 1, "settings": {"dtype": "fp32"}, "environment": environment}
    train_report.plot(made, tmp_path / "train.png")
    monkeypatch.undo()
    (figure,) = shown
    assert [axes.get_xlabel() for axes in figure.axes] == labels
    assert {axes.get_title() for axes in figure.axes} == set(panels)
    for axes in figure.axes:
        assert [line.get_label() for line in axes.lines] == panels[axes.get_title()]
    train_report.pyplot.close(figure)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--optimizers", "lion,sgd"], "--optimizers sgd: must name some of"),
        (["--optimizers", "lion+sgd"], "--optimizers lion+sgd: may add layer, lazy"),
        (["--optimizers", "lion+accumulation+ema"], "GradientAccumulation(EMA(optimizer))"),
        (["--optimizers", "lion+ema+ema"], "optimizer is wrapped in EMA already"),
        (["--optimizers", "lion+ema+layer"], "EMA(LayerAdaptation(optimizer))"),
        (["--optimizers", "torch-adamw+layer"], "optimizer must be a danlu optimizer, got torch.optim"),
        (["--optimizers", "lion+lazy"], "--optimizers lion+lazy: with lazy needs --untied"),
        (["--optimizers", "lion+layer+lazy", "--untied"], "mode='rows' shows it some of their rows"),
        (["--optimizers", "lion+ema", "--ema-decay", "1"], "decay must be in [0, 1), got 1.0"),
        (["--optimizers", "lion+lookahead", "--lookahead-k", "0"], "k must be an integer of at least 1"),
        (["--schedule", "constant"], "argument --schedule: invalid choice"),
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
