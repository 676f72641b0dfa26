"""The proxies of Lightning and Fabric are the wrapper in every public name."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import lightning_fabric
import pytest
import torch
from lightning_fabric.wrappers import _FabricOptimizer
from pytorch_lightning.core.optimizer import LightningOptimizer

import danlu
from taken_apart import AROUND, INSIDE
from training import give_gradients, parameters, some_params, train

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore:.*LeafSpec:FutureWarning"),
]


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
    "initial_state": lambda opt: opt.initial_state("exp_avg", parameters(opt)[0], (1,)),
    "sums": of_group("sums", (4, 2)),
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
    "state_format": lambda opt: opt.state_format("exp_avg", parameters(opt)[0]),
    "param_format": lambda opt: opt.param_format(parameters(opt)[0]),
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
    *("also_loads", "optional_states", "reference", "reference_takes_shape"),
    *("state_names", "takes_gradients"),
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
