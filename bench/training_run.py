"""One optimizer's training, which may be killed and goes on to the same bits; its settings and schedules."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import danlu
from harness import state_bytes
from model import GPT
from recipes import Recipe, shipped_weights
from text import Batches, Corpus, even_windows

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
WARM_UP_SHARE = 0.1


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is the same for every optimizer."""

    steps: int
    batch: int
    accumulate: int
    context: int
    layers: int
    width: int
    evaluate_every: int
    held_out_windows: int
    device: str
    dtype: str
    seed: int
    schedule: str
    untied: bool
    fsdp: int  # processes that share the parameters; 0: one that has them whole


class Run:
    """One optimizer's training, and everything that must survive its end in the middle."""

    def __init__(self, name: str, recipe: Recipe, settings: Settings, corpus: Corpus) -> None:
        self.name = name
        self.recipe = recipe
        self.settings = settings
        device = torch.device(settings.device)
        self.model = self.make_model()
        self.optimizer = recipe.make(self.model, settings.accumulate)
        self.scheduler = SCHEDULES[settings.schedule](self.optimizer, settings.steps)
        self.batches = Batches(corpus.train.to(device), settings.batch, settings.context, settings.seed)
        self.held_out = even_windows(corpus.held_out, settings.held_out_windows, settings.context).to(device)

        self.step = 0
        self.resumed = 0
        self.seconds = 0.0
        self.optimizer_seconds = 0.0
        self.state_bytes = 0
        self.curve: dict[str, list[float]] = {"step": [], "seconds": [], "held_out_loss": []}

    def train(self, checkpoint: Path, show: Callable[[Run], object]) -> None:
        """Trains to the last step; evaluates and saves on the way. `show` is told after each step."""
        if not self.curve["step"]:
            self.evaluate()
        show(self)
        while self.step < self.settings.steps:
            self.advance()
            if self.step % self.settings.evaluate_every == 0 or self.step == self.settings.steps:
                self.evaluate()
                self.save(checkpoint)
            show(self)

    def advance(self) -> None:
        """One update of the parameters, timed."""
        start = self.now()
        gradients = 1 if self.recipe.accumulates else self.settings.accumulate
        for part in range(1, self.settings.accumulate + 1):
            (self.model.loss(self.own(self.batches.next())) / gradients).backward()
            if part % gradients == 0:
                before = self.now()
                self.optimizer.step()
                self.optimizer_seconds += self.now() - before
                self.optimizer.zero_grad()
        self.scheduler.step()
        self.step += 1
        self.seconds += self.now() - start

    @torch.no_grad()
    def evaluate(self) -> None:
        """Adds a point to the curve."""
        own, ranks = self.own(self.held_out), max(1, self.settings.fsdp)
        parts = own.split(self.settings.batch // ranks)
        # before the first step there is no average
        with shipped_weights(self.optimizer) if self.step > 0 else contextlib.nullcontext():
            total = sum(float(self.model.loss(part)) * len(part) for part in parts)
        self.curve["step"].append(self.step)
        self.curve["seconds"].append(self.seconds)
        self.curve["held_out_loss"].append(self.of_all(total) / len(self.held_out))
        self.state_bytes = state_bytes(self.optimizer)

    # where a run on several processes differs (fsdp.py)

    @staticmethod
    def is_first() -> bool:
        """Whether this process speaks and writes."""
        return True

    def make_model(self) -> GPT:
        return make_model(self.settings)

    def own(self, windows: torch.Tensor) -> torch.Tensor:
        """Those that this process takes."""
        return windows

    def of_all(self, number: float) -> float:
        """Its sum over processes."""
        return number

    def weights(self) -> dict[str, Any]:
        return self.model.state_dict()

    def save(self, checkpoint: Path) -> None:
        save(self.state_dict(), checkpoint)

    def now(self) -> float:
        """Seconds, once the device has done what it was told."""
        if self.held_out.is_cuda:
            torch.cuda.synchronize(self.held_out.device)
        return time.perf_counter()

    PARTS = ("model", "optimizer", "scheduler", "batches")
    NUMBERS = ("step", "resumed", "seconds", "optimizer_seconds", "state_bytes", "curve")

    def state_dict(self) -> dict[str, Any]:
        parts = {name: getattr(self, name).state_dict() for name in self.PARTS}
        return parts | {name: getattr(self, name) for name in self.NUMBERS}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in self.PARTS:
            getattr(self, name).load_state_dict(state[name])
        for name in self.NUMBERS:
            setattr(self, name, state[name])
        self.resumed += 1

    def result(self) -> dict[str, Any]:
        """What is written down of a finished run."""
        parameters = sum(p.numel() for p in self.model.parameters())
        loss = self.curve["held_out_loss"][-1]
        return {
            "name": self.name,
            "optimizer": f"{self.recipe.optimizer.__module__}.{self.recipe.optimizer.__qualname__}",
            "lr": self.recipe.lr,
            "weight_decay": self.recipe.weight_decay,
            **self.recipe.more,
            "wrappers": [{"name": name, **settings} for name, settings in self.recipe.wrappers],
            "held_out_loss": loss,
            "bits_per_byte": loss / math.log(2),
            "seconds": self.seconds,
            "optimizer_seconds": self.optimizer_seconds,
            "state_bytes_per_parameter": self.state_bytes / parameters,
            "resumed": self.resumed,
            "curve": self.curve,
        }


def warm_up_and_cosine(step: int, *, steps: int) -> float:
    """The factor of lr: up in a line, then down to nothing as a cosine."""
    first = warm_up_steps(steps)
    if step < first:
        return (step + 1) / first
    return 0.5 + 0.5 * math.cos(math.pi * (step - first) / max(1, steps - first))


def cosine(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, functools.partial(warm_up_and_cosine, steps=steps))


def linear(optimizer: torch.optim.Optimizer, steps: int) -> danlu.PiecewiseLinearLR:
    """The same way up, and down in a line."""
    first = warm_up_steps(steps)
    return danlu.PiecewiseLinearLR(optimizer, {0: 1 / first, first - 1: 1.0, first: 1.0, steps: 0.0})


SCHEDULES = {"cosine": cosine, "linear": linear}


def warm_up_steps(steps: int) -> int:
    return max(1, round(WARM_UP_SHARE * steps))


def make_model(settings: Settings) -> GPT:
    """Made on the CPU in fp32, so that a seed gives the same weights on every device."""
    torch.manual_seed(settings.seed)
    model = GPT(
        context=settings.context, layers=settings.layers, width=settings.width, untied=settings.untied
    )
    return model.to(torch.device(settings.device), DTYPES[settings.dtype])


def save(state: dict[str, Any], checkpoint: Path) -> None:
    """Replaces the checkpoint at once: killed here, the old one is whole."""
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    unfinished = checkpoint.with_suffix(".tmp")
    with unfinished.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, checkpoint)
