"""Lightning, Fabric and accelerate around the wrappers: what their proxies do, and whole runs."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning_fabric
import pytest
import pytorch_lightning as lightning
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from lightning_fabric.wrappers import _FabricOptimizer
from pytorch_lightning.callbacks import Callback, LearningRateMonitor, ModelCheckpoint
from pytorch_lightning.core.optimizer import LightningOptimizer

import danlu
from taken_apart import AROUND, INSIDE, all_of
from training import all_same, give_gradients, parameters, some_params, train

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore:.*LeafSpec:FutureWarning"),
]


# What a proxy has from the class of the optimizer that it stands for.

STRATEGY = lightning_fabric.Fabric(accelerator="cpu", devices=1).strategy


class Steps:
    """What a LightningOptimizer asks of a Trainer's strategy."""

    def optimizer_step(self, optimizer: Any, closure: Callable[[], Any], **_: Any) -> Any:
        return optimizer.step(closure)


STEPS = Steps()


def lightning_proxy(opt: Any) -> Any:
    return LightningOptimizer._to_lightning_optimizer(opt, STEPS)  # type: ignore[arg-type]


def fabric_proxy(opt: Any) -> Any:
    return _FabricOptimizer(opt, STRATEGY)


PROXIES = {"lightning": lightning_proxy, "fabric": fabric_proxy}
NESTINGS: dict[str, Callable[[Any], Any]] = {
    **{
        f"{wrapping.id}-{name}": lambda params, name=name, wrapping=wrapping: wrapping.make(
            INSIDE[name](params)
        )
        for wrapping, name in zip(AROUND, itertools.cycle(["adamw", "torch-adamw", "lazy"]), strict=False)
    },
    **{name: INSIDE[name] for name in ("lazy", "layer", "lazy-layer")},
}


def through_hooks(register: str) -> Callable[[Any], Any]:
    """Registers a hook, does everything that hooks hear of, and gives what it heard."""

    def use(opt: Any) -> list[str]:
        heard: list[str] = []
        handle = getattr(opt, register)(lambda *_: heard.append("called"))
        give_gradients(parameters(opt), 7)
        opt.step()
        opt.load_state_dict(opt.state_dict())
        handle.remove()
        opt.step()
        return heard

    return use


def swapped(opt: Any) -> list[torch.Tensor]:
    with opt.swap():
        with pytest.raises(RuntimeError, match="are in place, a step would train them"):
            opt.step()
        return [p.detach().clone() for p in parameters(opt)]


def evaluated_and_trained(opt: Any) -> list[torch.Tensor]:
    opt.eval()
    weights = [p.detach().clone() for p in parameters(opt)]
    opt.train()
    return weights


def given_another(name: str, change: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Gives the attribute another value, and asks for it."""

    def use(opt: Any) -> Any:
        before = getattr(opt, name)
        setattr(opt, name, change(before))
        return before, getattr(opt, name)

    return use


def another_group(opt: Any) -> None:
    opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(4, 2))], "lr": 0.5, "lazy": True})
    opt.param_groups[0]["lazy"] = False


def loaded(opt: Any) -> None:
    saved = copy.deepcopy(opt.state_dict())
    train(opt, [8])
    opt.load_state_dict(saved)


# what is done with each public name of a wrapper, and what comes of it
USES: dict[str, Callable[[Any], Any]] = {
    "add_param_group": another_group,
    "alpha": lambda opt: opt.alpha,
    "backend_report": lambda opt: str(opt.backend_report()),
    "decay": lambda opt: opt.decay,
    "defaults": given_another("defaults", lambda defaults: {**defaults, "more": 1}),
    "eval": lambda opt: opt.eval(),
    "evaluated": lambda opt: opt.evaluated,
    "flush": lambda opt: (opt.flush(), opt.flush()),
    "k": lambda opt: opt.k,
    "load_state_dict": loaded,
    "mode": lambda opt: opt.mode,
    "param_groups": given_another("param_groups", lambda groups: [{**group, "lr": 0.25} for group in groups]),
    "position": given_another("position", lambda position: position + 1),
    "register_load_state_dict_post_hook": through_hooks("register_load_state_dict_post_hook"),
    "register_load_state_dict_pre_hook": through_hooks("register_load_state_dict_pre_hook"),
    "register_state_dict_post_hook": through_hooks("register_state_dict_post_hook"),
    "register_state_dict_pre_hook": through_hooks("register_state_dict_pre_hook"),
    "register_step_post_hook": through_hooks("register_step_post_hook"),
    "register_step_pre_hook": through_hooks("register_step_pre_hook"),
    "state": given_another("state", lambda state: {p: dict(held) for p, held in list(state.items())[:2]}),
    "state_dict": lambda opt: opt.state_dict(),
    "step": lambda opt: (train(opt, [7]), opt.step(lambda: torch.tensor(3.0))),
    "stepped": given_another("stepped", lambda stepped: not stepped),
    "steps": lambda opt: opt.steps,
    "swap": swapped,
    "train": evaluated_and_trained,
    "zero_grad": lambda opt: (opt.zero_grad(set_to_none=False), parameters(opt)[0].grad),
}


def of_group(name: str, *others: Any) -> Callable[[Any], Any]:
    return lambda opt: [getattr(opt, name)(group, *others) for group in opt.param_groups]


def in_place(opt: Any) -> None:
    opt.put_in_place([(p, p.detach() + 1) for p in parameters(opt)])


def chosen_by_groups(opt: Any) -> Any:
    before = of_group("sparse_mode")(opt)
    opt.backend_report()
    opt.param_groups[0]["lazy"] = False
    return before


# and of those names that danlu's own code uses
INNER_USES: dict[str, Callable[[Any], Any]] = {
    "adapt": lambda opt: opt.adapt([], {}),
    "check_order": lambda opt: opt.check_order(danlu.Lion(some_params())),
    "check_position": lambda opt: opt.check_position(1),
    "counter_device": lambda opt: opt.counter_device(parameters(opt)[0]),
    "counters": lambda opt: opt.counters(3, 1),
    "count_update": lambda opt: opt.count_update(),
    "accumulation_steps": of_group("accumulation_steps"),
    "fold": of_group("fold", 2.0, 1.0),
    "hyper": of_group("hyper"),
    "initial_state": lambda opt: opt.initial_state("exp_avg", parameters(opt)[0], (4, 1)),
    "sparse_mode": chosen_by_groups,
    "learning_rate": of_group("learning_rate"),
    "make_state": lambda opt: opt.make_state(),
    "marks": lambda opt: opt.marks(),
    "matrix": of_group("matrix", (4, 2)),
    "summed_dims": of_group("summed_dims", (4, 2)),
    "moves": of_group("moves"),
    "put_back": lambda opt: (opt.eval(), opt.put_back()),
    "put_in_place": in_place,
    "refuse_capture": lambda opt: opt.refuse_capture(),
    "refuse_in_evaluation": lambda opt: opt.refuse_in_evaluation(),
    "rule": of_group("rule", (4, 2)),
    "settings": lambda opt: opt.settings(),
    "sign": of_group("sign"),
    "state_dtype": lambda opt: opt.state_dtype("exp_avg", parameters(opt)[0]),
    "states": of_group("states", (4, 2)),
    "step_inner": lambda opt: opt.step_inner(),
    "structure": of_group("structure"),
    "translate": lambda opt: opt.translate(opt.state_dict()),
    "variant": lambda opt: opt.variant(opt.param_groups[0], parameters(opt)[0]),
    "weights_for_evaluation": lambda opt: [value for _, value in opt.weights_for_evaluation()],
}
# the same for every object: constants, functions that no object comes to
SAME = {
    *("OptimizerPostHook", "OptimizerPreHook", "profile_hook_step", "rank", "position_key", "training_key"),
    *("backend", "capturable", "check", "coefficients", "counters_on_device", "outcome", "reduces"),
    "max_grad_norm",
    *("also_loads", "optional_states", "reference", "state_names", "takes_gradients"),
}
OWN = {"optimizer"}  # the proxy's is the wrapper


def plain(x: Any) -> Any:
    """What can be compared."""
    if isinstance(x, torch.Tensor):
        return str(x.dtype), x.requires_grad, x.tolist()
    if isinstance(x, Mapping):
        return [(key if isinstance(key, str | int) else plain(key), plain(x[key])) for key in x]
    if isinstance(x, list | tuple):
        return [plain(y) for y in x]
    return getattr(x, "__func__", x)


def snapshot(opt: Any) -> Any:
    """Everything that a use may change: parameters, gradients, states, groups, attributes."""
    params = parameters(opt)
    found = [plain(params), plain([p.grad for p in params]), plain(opt.state_dict()), plain(opt.defaults)]
    inner = opt
    while inner is not None:
        found += [getattr(inner, name, None) for name in ("stepped", "position", "_selective")]
        found += [plain(dict(getattr(getattr(inner, "_shared", None), "training", None) or ()))]
        inner = getattr(inner, "_inner", None)
    return found


def used(make: Callable[[Any], Any], stand_in: Callable[[Any], Any], name: str) -> Any:
    """What comes of a use through `stand_in`, what it changes, and how the optimizer itself goes on."""
    opt = make([{"params": [p]} for p in some_params(2)])
    train(opt, range(4))  # within a cycle
    proxy = stand_in(opt)
    if name in SAME:
        return plain(getattr(proxy, name))
    use = USES.get(name) or INNER_USES[name]
    result = plain(use(proxy))
    after = snapshot(opt)
    opt.train()
    train(opt, range(10, 12))
    return result, after, snapshot(opt), plain(opt.state_dict() if "state_dict" in name else use(proxy))


@pytest.mark.parametrize("nesting", NESTINGS)
def test_a_proxy_is_the_wrapper_in_every_public_name(nesting: str) -> None:
    make = NESTINGS[nesting]
    opt = make(some_params())
    names = {name for name in dir(opt) if not name.startswith("_")} - OWN
    assert names <= {*USES, *INNER_USES, *SAME}
    for name in sorted(names):
        expected = used(make, lambda opt: opt, name)
        for kind, proxy_of in PROXIES.items():
            assert used(make, proxy_of, name) == expected, (kind, name)
    for kind, proxy_of in PROXIES.items():
        proxy = proxy_of(opt)
        assert isinstance(proxy, type(opt))
        assert proxy.optimizer is opt
        assert repr(proxy).removeprefix(kind.title()) == repr(opt)


# Whole runs.

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
