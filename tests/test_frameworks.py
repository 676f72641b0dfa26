"""Whole runs with the wrappers by Lightning, Fabric and accelerate."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning_fabric
import pytest
import pytorch_lightning as lightning
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from pytorch_lightning.callbacks import Callback, LearningRateMonitor, ModelCheckpoint

import danlu
from taken_apart import all_of
from training import all_same, give_gradients, parameters, some_params, train

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore:.*LeafSpec:FutureWarning"),
]


WHOLE_RUNS: dict[str, Callable[[Any], Any]] = {
    "ema": lambda params: danlu.EMA(danlu.AdamW(params, lr=1e-2), decay=0.8),
    "lookahead": lambda params: danlu.Lookahead(danlu.AdamW(params, lr=1e-2), k=3),
    "accumulation": lambda params: danlu.GradientAccumulation(danlu.AdamW(params, lr=1e-2), steps=3),
    "three": lambda params: danlu.GradientAccumulation(
        danlu.EMA(danlu.Lookahead(torch.optim.AdamW(params, lr=1e-2), k=2), decay=0.8), 2
    ),
}
BATCHES = 8


def some_model() -> torch.nn.Linear:
    model = torch.nn.Linear(3, 2)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.linspace(-1, 1, p.numel()).reshape(p.shape))
    return model


def some_loss(model: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
    loss: torch.Tensor = (model(batch) - batch[:, :2].sin()).square().mean()
    return loss


def some_batches() -> list[torch.Tensor]:
    return [torch.linspace(-i, i + 1, 12).reshape(4, 3) for i in range(BATCHES)]


class Module(lightning.LightningModule):
    def __init__(self, make: Callable[[Any], Any]) -> None:
        super().__init__()
        self.make, self.model = make, some_model()

    def training_step(self, _: torch.Tensor, __: int) -> torch.Tensor:
        # a run resumed within an epoch begins the loader anew
        return some_loss(self.model, some_batches()[self.global_step % BATCHES])

    def validation_step(self, batch: torch.Tensor, _: int) -> torch.Tensor:
        return some_loss(self.model, batch)

    def configure_optimizers(self) -> Any:
        opt = self.make(self.parameters())
        schedule = danlu.PiecewiseLinearLR(opt, {0: 1.0, 2 * BATCHES: 0.0})
        return {"optimizer": opt, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Averages(Callback):
    """Evaluates with the weights for it, which are in place until training goes on: checkpoints have them."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def on_validation_start(self, trainer: Any, module: Any) -> None:
        module.optimizers().eval()
        self.seen.append(module.model.weight.detach().clone())

    def on_train_batch_start(self, trainer: Any, module: Any, *_: Any) -> None:
        module.optimizers().train()


def fit(make: Callable[[Any], Any], folder: Path, resumed: Path | None = None) -> tuple[Module, Averages]:
    """Two epochs with two validations each, or what follows on a checkpoint."""
    module, averages = Module(make), Averages()
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=2,
        val_check_interval=BATCHES // 2,
        num_sanity_val_steps=0 if resumed else 1,
        logger=lightning.loggers.CSVLogger(folder),
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[
            averages,
            LearningRateMonitor("step"),
            ModelCheckpoint(folder, "{step}", save_top_k=-1),
        ],
    )
    batches = torch.utils.data.DataLoader(some_batches(), batch_size=None)  # type: ignore[arg-type]
    few = torch.utils.data.DataLoader(some_batches()[:1], batch_size=None)  # type: ignore[arg-type]
    trainer.fit(module, batches, few, ckpt_path=resumed, weights_only=True)
    return module, averages


@pytest.mark.parametrize("name", WHOLE_RUNS)
def test_a_trainer_of_lightning(name: str, tmp_path: Path) -> None:
    """Saved in a validation, with its weights in place, and resumed from there: to the same bits."""
    make = WHOLE_RUNS[name]
    by_hand = some_model()
    opt = make(by_hand.parameters())
    schedule = danlu.PiecewiseLinearLR(opt, {0: 1.0, 2 * BATCHES: 0.0})
    averages = []
    for t, batch in enumerate(some_batches() * 2):
        opt.zero_grad()
        some_loss(by_hand, batch).backward()
        opt.step()
        schedule.step()
        if t % (BATCHES // 2) == BATCHES // 2 - 1:
            opt.eval()
            averages.append(by_hand.weight.detach().clone())
            opt.train()
    saved = tmp_path / f"step={BATCHES // 2}.ckpt"
    for resumed, seen_before in ((None, 0), (saved, 1)):
        module, evaluated = fit(make, tmp_path / f"{seen_before}" if resumed else tmp_path, resumed)
        assert all_same(evaluated.seen[-len(averages) + seen_before :], averages[seen_before:])
        module.optimizers().train()
        assert all_same(all_of(module.optimizers()), all_of(opt))


class Alternating(lightning.LightningModule):
    """Two optimizers that take turns, each through its proxy, with the other's parameters held."""

    def __init__(self, make: Callable[[Any], Any]) -> None:
        super().__init__()
        self.make, self.models = make, torch.nn.ModuleList([some_model(), some_model()])
        self.automatic_optimization = False

    def training_step(self, batch: torch.Tensor, _: int) -> None:
        for i, opt in enumerate(self.optimizers()):  # type: ignore[arg-type]
            with opt.toggle_model():
                assert [p.requires_grad for p in self.models.parameters()] == [i == 0] * 2 + [i == 1] * 2
                opt.zero_grad()
                self.manual_backward(some_loss(self.models[0], batch) + some_loss(self.models[1], batch))
                loss = opt.step(lambda: torch.tensor(7.0))
            assert loss == 7.0

    def on_train_epoch_end(self) -> None:
        for opt in self.optimizers():  # type: ignore[union-attr]
            if isinstance(opt, danlu.GradientAccumulation):
                assert opt.flush()
            assert opt.stepped

    def configure_optimizers(self) -> Any:
        return [self.make(model.parameters()) for model in self.models]


@pytest.mark.parametrize("name", WHOLE_RUNS)
def test_optimizers_that_lightning_toggles(name: str) -> None:
    by_hand = some_model()
    opt = WHOLE_RUNS[name](by_hand.parameters())
    for batch in some_batches()[:5]:
        opt.zero_grad()
        some_loss(by_hand, batch).backward()
        opt.step()
    if hasattr(opt, "flush"):
        opt.flush()
    module = Alternating(WHOLE_RUNS[name])
    quiet = dict(enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False)
    trainer = lightning.Trainer(accelerator="cpu", devices=1, max_epochs=1, logger=False, **quiet)
    trainer.fit(module, torch.utils.data.DataLoader(some_batches()[:5], batch_size=None))  # type: ignore[arg-type]
    for proxy in module.optimizers():  # type: ignore[union-attr]
        assert all_same(all_of(proxy), all_of(opt))


@pytest.mark.parametrize("name", WHOLE_RUNS)
def test_fabric(name: str, tmp_path: Path) -> None:
    """Set up, stepped, saved and loaded in the middle of a cycle."""
    make = WHOLE_RUNS[name]
    fabric = lightning_fabric.Fabric(accelerator="cpu", devices=1)

    def go_on(model: Any, opt: Any, batches: list[torch.Tensor]) -> None:
        for batch in batches:
            opt.zero_grad()
            fabric.backward(some_loss(model, batch))
            opt.step()

    by_hand = some_model()
    alone = make(by_hand.parameters())
    go_on(by_hand, alone, some_batches())
    for begin in range(4):
        runs = []
        for _ in range(2):
            model = some_model()
            runs.append(fabric.setup(model, make(model.parameters())))
        go_on(*runs[0], some_batches()[:begin])
        runs[0][1].eval()
        fabric.save(tmp_path / "saved", {"model": runs[0][0], "opt": runs[0][1]})
        fabric.load(tmp_path / "saved", {"model": runs[1][0], "opt": runs[1][1]})
        for model, opt in runs:
            opt.train()
            go_on(model, opt, some_batches()[begin:])
            assert all_same(all_of(opt), all_of(alone)), begin


@pytest.mark.parametrize("name", WHOLE_RUNS)
def test_accelerate(name: str) -> None:
    """As transformers' Trainer: evaluated, saved at the same step, and trained on; and resumed from there."""
    make = WHOLE_RUNS[name]
    accelerator = Accelerator(cpu=True)

    def go_on(model: Any, opt: Any, batches: list[torch.Tensor]) -> None:
        for batch in batches:
            opt.train()
            accelerator.backward(some_loss(model, batch))
            opt.step()
            opt.zero_grad()

    by_hand = some_model()
    alone = make(by_hand.parameters())
    go_on(by_hand, alone, some_batches())
    for begin in range(4):
        (model, opt), (other, resumed) = (
            accelerator.prepare(model, make(model.parameters())) for model in (some_model(), some_model())
        )
        go_on(model, opt, some_batches()[:begin])
        opt.eval()
        in_place = [p.detach().clone() for p in model.parameters()]
        saved = copy.deepcopy((model.state_dict(), opt.state_dict()))
        other.load_state_dict(saved[0])
        resumed.load_state_dict(saved[1])
        assert all_same(in_place, list(other.parameters()))
        go_on(model, opt, some_batches()[begin:])
        go_on(other, resumed, some_batches()[begin:])
        assert all_same(all_of(opt), all_of(alone)), begin
        assert all_same(all_of(resumed), all_of(alone)), begin


@pytest.mark.parametrize("name", WHOLE_RUNS)
def test_accelerate_accumulates_and_saves(name: str, tmp_path: Path) -> None:
    make = WHOLE_RUNS[name]
    by_hand = some_model()
    alone = make(by_hand.parameters())
    for i, batch in enumerate(some_batches()):
        (some_loss(by_hand, batch) / 2).backward()
        if i % 2:
            alone.step()
            alone.zero_grad()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = some_model()
    prepared, opt = accelerator.prepare(model, make(model.parameters()))
    for i, batch in enumerate(some_batches()):
        with accelerator.accumulate(prepared):
            accelerator.backward(some_loss(prepared, batch))
            opt.step()
            opt.zero_grad()
        if i == 3:
            opt.eval()
            accelerator.save_state(str(tmp_path), safe_serialization=False)
            opt.train()
    assert all_same(all_of(opt), all_of(alone))
    accelerator.load_state(str(tmp_path))
    opt.train()
    for batch in some_batches()[4:]:
        with accelerator.accumulate(prepared):
            accelerator.backward(some_loss(prepared, batch))
            opt.step()
            opt.zero_grad()
    assert all_same(all_of(opt), all_of(alone))


@pytest.mark.parametrize("name", WHOLE_RUNS)
def test_accelerate_scales_gradients(name: str) -> None:
    """Its scaler's step replaces that of the wrapper; one that it leaves out is none for the wrapper."""
    Accelerator(cpu=True)
    a, b = (WHOLE_RUNS[name](some_params()) for _ in range(2))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1000)
    scaler.scale(torch.zeros(()))
    accelerated = AcceleratedOptimizer(a, scaler=scaler)
    for t in range(7):
        give_gradients(parameters(a), t, scaler.get_scale())
        if t == 1:
            parameters(a)[0].grad[0, 0] = float("inf")  # type: ignore[index]
        accelerated.step()
        assert accelerated.step_was_skipped == (t == 1)
        if t != 1:
            train(b, [t])
    assert all_same(all_of(a), all_of(b))
