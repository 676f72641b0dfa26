"""Trains a byte-level GPT on the standard library's source with many optimizers, on the same batches.

    python bench/train.py                                     seven of them, some 2 minutes on 2 cores
    python bench/train.py --optimizers lion,adamw --steps 4000
    python bench/train.py --optimizers tiger,adamw --batch 2 --accumulate 4
    python bench/train.py --optimizers adamw,adamw+ema,adamw+lookahead+ema --ema-decay 0.99
    python bench/train.py --optimizers lion,lion+lazy --untied --schedule linear
    python bench/train.py --optimizers adamw,adafactor --fsdp 2
    python bench/train.py --device cuda --dtype bf16 --layers 8 --width 512 --context 512 --batch 64

A name is an optimizer's with its wrappers', innermost first: layer, lazy, lookahead, ema and accumulation.
All start from the same weights and see the same batches, with as many updates; files, not
bytes, are held out. Loss and saved weights are those that a user would ship: of EMA the averages, of
Lookahead the slow weights. Layer adaptation has an lr of its own, since its steps are relative; the others
have their optimizer's. With --fsdp N so many processes share the parameters and the batches, over gloo; the
losses are those of one process, but for rounding.

Writes train.json and train.png (held-out loss against training time and against steps, or with wrappers
against steps for each optimizer), and prints a table. Killed and started again with the same options it goes
on from its last checkpoint, to the same bits; after other options, or another build of danlu, it starts anew.
A run that comes to its end removes its checkpoints.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import danlu
from harness import ROOT, environment, positive
from model import HEAD_WIDTH
from out_option import add_out_option
from recipes import (
    DEFAULT,
    RECIPES,
    WRAPPERS,
    Recipe,
    add_wrapper_options,
    recipe_of,
    shipped_weights,
)
from text import Batches, Corpus, load_corpus
from train_report import plot, table
from training_run import DTYPES, SCHEDULES, Run, Settings, make_model

SECONDS_BETWEEN_LINES = 10


def main(arguments: Sequence[str] | None = None) -> None:
    options, settings, recipes = parse(arguments)
    if torch.device(settings.device).type == "cuda":
        # has to be set before cuBLAS is first used; without both of these a run cannot be repeated
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    corpus = load_corpus()
    if settings.fsdp:
        from fsdp import ShardedRun  # only here: the others need no torch.distributed
        from ranks import run_on

        run_on(settings.fsdp, train, options, settings, recipes, corpus, ShardedRun)
    else:
        train(options, settings, recipes, corpus, Run)


def train(
    options: argparse.Namespace,
    settings: Settings,
    recipes: dict[str, Recipe],
    corpus: Corpus,
    kind: type[Run],
) -> None:
    """In this process; of several ranks the first one speaks and writes."""
    first = kind.is_first()
    console = Console(width=None if sys.stdout.isatty() else 110, quiet=not first)
    conditions = circumstances(settings, corpus)
    warm_up(settings, corpus)

    runs = []
    with Ticker(console, settings.steps, max(map(len, recipes))) as ticker:
        for name, recipe in recipes.items():
            checkpoint = options.checkpoint / f"{name}-{key(settings, recipe, conditions)}.pt"
            run = kind(name, recipe, settings, corpus)
            if options.fresh:
                checkpoint.unlink(missing_ok=True)
            if checkpoint.exists():
                run.load_state_dict(torch.load(checkpoint, map_location="cpu", weights_only=True))
                console.print(f"{name} goes on from step {run.step:,}, as {checkpoint} says")
            run.train(checkpoint, ticker.show)
            runs.append((run, checkpoint))

    options.out.mkdir(parents=True, exist_ok=True)
    if options.save_weights:
        for run, _ in runs:
            with shipped_weights(run.optimizer):
                weights = run.weights()
                if first:
                    torch.save(weights, options.out / f"{run.name}.pt")
    if not first:
        return
    results = {
        "settings": dataclasses.asdict(settings),
        "environment": conditions,
        "parameters": sum(p.numel() for p in runs[0][0].model.parameters()),
        "runs": [run.result() for run, _ in runs],
    }
    (options.out / f"{options.name}.json").write_text(json.dumps(results, indent=2) + "\n")
    plot(results, options.out / f"{options.name}.png")
    for _, checkpoint in runs:
        checkpoint.unlink()
    console.print(table(results))
    console.print(f"wrote {options.name}.json and {options.name}.png to {options.out}")


class Ticker:
    """Shows how far the runs are: bars on a terminal, else a line every few seconds."""

    def __init__(self, console: Console, steps: int, width: int) -> None:
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        self.console = console
        self.steps = steps
        self.width = width
        self.progress = Progress(*columns, console=console, disable=not console.is_terminal)
        self.tasks: dict[str, Any] = {}
        self.printed = time.monotonic()

    def __enter__(self) -> Ticker:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def show(self, run: Run) -> None:
        if run.name not in self.tasks:
            self.tasks[run.name] = self.progress.add_task(run.name, total=self.steps, completed=run.step)
        text = f"{run.name:{self.width}} held-out loss {run.curve['held_out_loss'][-1]:.3f}"
        self.progress.update(self.tasks[run.name], completed=run.step, description=text)
        due = run.step == self.steps or time.monotonic() - self.printed > SECONDS_BETWEEN_LINES
        if due and not self.console.is_terminal:
            self.printed = time.monotonic()
            self.console.print(f"{text} at step {run.step:,} of {self.steps:,}, {run.seconds:.1f} s")


def warm_up(settings: Settings, corpus: Corpus) -> None:
    """Pays for what the first steps of a process cost, before any optimizer is timed."""
    model = make_model(settings)
    batches = Batches(corpus.train.to(settings.device), settings.batch, settings.context, settings.seed)
    for _ in range(3):
        model.loss(batches.next()).backward()


def key(settings: Settings, recipe: Recipe, conditions: dict[str, Any]) -> str:
    """Names a run by everything its bits depend on."""
    facts = [dataclasses.asdict(settings), dataclasses.asdict(recipe), conditions]
    return hashlib.sha256(json.dumps(facts, default=repr).encode()).hexdigest()[:16]


def circumstances(settings: Settings, corpus: Corpus) -> dict[str, Any]:
    """What was run, on what and with what."""
    device = torch.device(settings.device)
    of_gpu = {"device": torch.cuda.get_device_name(device)} if device.type == "cuda" else {}
    code = sorted([*Path(__file__).parent.glob("*.py"), *Path(danlu.__file__).parent.rglob("*.[ps][yo]")])
    return {
        **environment(),
        **of_gpu,
        "train_bytes": len(corpus.train),
        "held_out_bytes": len(corpus.held_out),
        "corpus_sha256": corpus.digest,
        "code_sha256": hashlib.sha256(b"".join(path.read_bytes() for path in code)).hexdigest(),
    }


def parse(
    arguments: Sequence[str] | None,
) -> tuple[argparse.Namespace, Settings, dict[str, Recipe]]:
    """The options, checked; what they say of the training; and the optimizers to train with."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = functools.partial(parser.add_argument, metavar="N", type=positive)
    add("--steps", default=250, help="updates of the parameters (default: %(default)s)")
    add("--batch", default=8, help="texts per gradient (default: %(default)s)")
    add(
        "--accumulate",
        default=1,
        help="gradients per step (default: %(default)s); Tiger and NAME+accumulation take them one by one, "
        "the others their sum",
    )
    add("--context", default=64, help="bytes per text (default: %(default)s)")
    add("--layers", default=4, help="transformer blocks (default: %(default)s)")
    add("--width", default=256, help=f"of the model, a multiple of {HEAD_WIDTH} (default: %(default)s)")
    add("--evaluate-every", help="steps from one evaluation and checkpoint to the next (default: steps / 10)")
    add("--held-out-windows", default=128, help="texts to evaluate on (default: %(default)s)")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="of the weights and batches")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ... (default: %(default)s)")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="fp32",
        help="of parameters, gradients and arithmetic (default: %(default)s)",
    )
    parser.add_argument(
        "--schedule",
        choices=SCHEDULES,
        default="cosine",
        help="how lr falls to 0 after the warm-up (default: %(default)s)",
    )
    parser.add_argument(
        "--fsdp",
        metavar="N",
        type=positive,
        default=0,
        help="processes on this machine that share parameters and batches (default: one alone)",
    )
    parser.add_argument("--untied", action="store_true", help="give the head weights of its own")
    parser.add_argument(
        "--optimizers",
        metavar="NAME,...",
        type=lambda text: text.split(","),
        default=DEFAULT,
        help=f"some of {', '.join(RECIPES)}, each with any of +{', +'.join(WRAPPERS)} around it, innermost "
        f"first (default: {','.join(DEFAULT)})",
    )
    add_wrapper_options(parser)
    parser.add_argument(
        "--lr", metavar="NAME=LR", action="append", default=[], help="another lr for one; may be repeated"
    )
    add_out_option(parser)
    parser.add_argument("--name", default="train", help="of the results' files (default: %(default)s)")
    parser.add_argument("--save-weights", action="store_true", help="write final weights to OUT, too")
    parser.add_argument(
        "--checkpoint",
        metavar="DIR",
        type=Path,
        default=ROOT / "build" / "checkpoints",
        help="where unfinished runs are kept (default: build/checkpoints)",
    )
    parser.add_argument("--fresh", action="store_true", help="do not go on from a checkpoint")
    options = parser.parse_args(arguments)

    if options.width % HEAD_WIDTH:
        parser.error(f"--width must be a multiple of {HEAD_WIDTH}, got {options.width}")
    try:
        torch.empty(0, device=options.device)
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device {options.device} cannot be used: {error}")
    if options.fsdp:
        check_fsdp(parser, options)
    recipes = {}
    for name in options.optimizers:
        try:
            recipes[name] = recipe_of(name, options)
        except (TypeError, ValueError) as error:
            parser.error(f"--optimizers {name}: {error}")
    for text in options.lr:
        name, _, lr = text.partition("=")
        if name not in recipes:
            parser.error(f"--lr must name one of {', '.join(recipes)}, got {text!r}")
        try:
            recipes[name] = dataclasses.replace(recipes[name], lr=float(lr))
        except ValueError:
            parser.error(f"--lr must end in =NUMBER, got {text!r}")
    options.evaluate_every = options.evaluate_every or max(1, options.steps // 10)
    names = [field.name for field in dataclasses.fields(Settings)]
    return options, Settings(**{name: getattr(options, name) for name in names}), recipes


def check_fsdp(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    if torch.device(options.device).type != "cpu":
        parser.error(f"--fsdp: runs on the CPU only, got --device {options.device}")
    for option, number in (("--batch", options.batch), ("--held-out-windows", options.held_out_windows)):
        if number % options.fsdp:
            parser.error(f"{option} {number}: must be a multiple of --fsdp {options.fsdp}")


if __name__ == "__main__":
    main()
