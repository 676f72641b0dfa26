"""A state_dict is taken as a whole or not at all: what is another optimizer's, or does not fit, is named."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch

import danlu
from cases import ALL, F32, F64
from danlu import checkpoint
from training import all_same, copies, everything, parameters, some_params, train
from wrapped import LAZY

MAKERS = {case.id: case.make for case in ALL} | LAZY
every_maker = pytest.mark.parametrize("name", MAKERS)
Change = Callable[[dict[str, Any]], Any]


def named(count: int = 3) -> list[tuple[str, torch.nn.Parameter]]:
    return [(f"layer{i}", p) for i, p in enumerate(some_params(count))]


def saved_by(make: Callable[..., torch.optim.Optimizer], **options: Any) -> dict[str, Any]:
    opt = make(some_params(), **options)
    train(opt, range(3))
    return copy.deepcopy(opt.state_dict())


def refused(opt: torch.optim.Optimizer, saved: dict[str, Any], match: str, kind: Any = ValueError) -> None:
    """Nothing of the optimizer changes, and it goes on."""
    before, states = copies(opt), {p: dict(held) for p, held in opt.state.items()}
    groups = [dict(group) for group in opt.param_groups]
    with pytest.raises(kind, match=match):
        opt.load_state_dict(saved)
    assert all_same(everything(opt), before)
    assert [dict(group) for group in opt.param_groups] == groups
    assert all(opt.state[p][k] is value for p, held in states.items() for k, value in held.items())
    train(opt, range(3, 4))


# another optimizer's checkpoint: whose, into what, what the message says
FOREIGN: list[tuple[Any, dict[str, Any], Any, str]] = [
    (danlu.Tiger, {}, danlu.AdamW, "another optimizer's"),
    (danlu.Lion, {}, danlu.AdamW, "layer0: the checkpoint lacks 'exp_avg_sq' that AdamW needs"),
    (danlu.Lion, {}, danlu.LAMB, "layer0: the checkpoint lacks 'exp_avg_sq' that LAMB needs"),
    (danlu.Lion, {}, danlu.Tiger, "they have 'betas' and lack 'beta', 'accumulation_steps'"),
    (danlu.Tiger, {}, danlu.Lion, "another optimizer's"),
    (danlu.AdamW, {}, danlu.Lion, "another optimizer's: Lion has no 'exp_avg_sq'"),
    (danlu.LAMB, {}, danlu.Lion, "Lion has no 'exp_avg_sq'"),
    (danlu.AdaX, {}, danlu.AdamW, "they have 'eps_mode' and lack 'amsgrad' of AdamW"),
    (danlu.AdamW, {}, danlu.AdaXW, "they have 'amsgrad' and lack 'eps_mode' of AdaXW"),
    (danlu.LAMB, {}, danlu.AdamW, "'trust_clip', 'always_adapt' and lack 'amsgrad'"),
    (danlu.Adafactor, dict(lr=1e-3), danlu.Amos, "another optimizer's"),
    (danlu.Amos, dict(lr=1e-3), danlu.Lion, "another optimizer's"),
    (torch.optim.RMSprop, {}, danlu.AdamW, "another optimizer's: they have 'momentum', 'alpha'"),
    (torch.optim.SGD, dict(momentum=0.9), danlu.Lion, "another optimizer's"),
    (torch.optim.Adagrad, {}, danlu.AdamW, "layer0: the checkpoint lacks 'exp_avg', 'exp_avg_sq'"),
    (torch.optim.Adamax, {}, danlu.AdamW, "layer0: the checkpoint lacks 'exp_avg_sq'"),
    (torch.optim.NAdam, {}, danlu.AdamW, "they have 'momentum_decay'"),
    (torch.optim.AdamW, {}, danlu.Adam, "decoupled_weight_decay must be False"),
]


@pytest.mark.parametrize(
    ("theirs", "options", "ours", "match"), FOREIGN, ids=lambda x: getattr(x, "__name__", "")
)
def test_another_optimizers_checkpoint_is_refused(
    theirs: Any, options: dict[str, Any], ours: Any, match: str
) -> None:
    opt = ours(named(), lr=1e-3)
    train(opt, range(3))
    refused(opt, saved_by(theirs, **options), match)


def eight_bit(held: dict[str, Any]) -> None:
    for i, name in enumerate(("exp_avg", "exp_avg_sq")):
        held[f"state{i + 1}"] = held.pop(name).to(torch.uint8)


# of AdamW's state for the second parameter: what is done to it, and what is said then
BROKEN: dict[str, tuple[Change, str]] = {
    "a moment is missing": (lambda s: s.pop("exp_avg_sq"), "layer1: the checkpoint lacks 'exp_avg_sq'"),
    "step is missing": (lambda s: s.pop("step"), "layer1: the checkpoint lacks 'step'"),
    "only step": (lambda s: (s.pop("exp_avg"), s.pop("exp_avg_sq")), "lacks 'exp_avg', 'exp_avg_sq'"),
    "8 bits": (eight_bit, "layer1: the checkpoint lacks 'exp_avg', 'exp_avg_sq' .* has 'step', 'state1'"),
    "another shape": (
        lambda s: s.update(exp_avg=torch.zeros(7)),
        r"layer1: state 'exp_avg' has shape \(7,\)",
    ),
    "integers": (
        lambda s: s.update(exp_avg=s["exp_avg"].int()),
        "layer1: state 'exp_avg' has dtype torch.int32",
    ),
    "complex": (
        lambda s: s.update(exp_avg=s["exp_avg"] + 0j),
        "layer1: state 'exp_avg' has dtype torch.complex",
    ),
    "sparse": (
        lambda s: s.update(exp_avg=s["exp_avg"].to_sparse()),
        "layer1: the state 'exp_avg' has layout",
    ),
    "no tensor": (lambda s: s.update(exp_avg=[1.0]), "layer1: state 'exp_avg' must be a tensor, got list"),
    "None": (lambda s: s.update(exp_avg=None), "layer1: state 'exp_avg' must be a tensor, got NoneType"),
    "meta": (
        lambda s: s.update(exp_avg=s["exp_avg"].to("meta")),
        "layer1: state 'exp_avg' is on the meta device",
    ),
    "meta step": (
        lambda s: s.update(step=torch.tensor(3.0, device="meta")),
        "layer1: state 'step' must be a",
    ),
    "two steps": (
        lambda s: s.update(step=torch.ones(2)),
        "layer1: state 'step' must be a number or a tensor of",
    ),
    "step is text": (lambda s: s.update(step="3"), "layer1: state 'step' must be a number .* got '3'"),
    "step is NaN": (
        lambda s: s.update(step=float("nan")),
        "layer1: state 'step' must be finite and at least 0",
    ),
    "step is negative": (lambda s: s.update(step=-1), "layer1: state 'step' must be finite and at least 0"),
    "step is infinite": (
        lambda s: s.update(step=float("inf")),
        "layer1: state 'step' must be finite and at least 0",
    ),
    "a user's on meta": (
        lambda s: s.update(mine=torch.ones(2, device="meta")),
        "layer1: state 'mine' is on the",
    ),
}


@pytest.mark.parametrize(("change", "match"), BROKEN.values(), ids=BROKEN)
def test_a_state_that_does_not_fit_is_named_and_nothing_changes(change: Change, match: str) -> None:
    saved = saved_by(danlu.AdamW)
    change(saved["state"][1])
    opt = danlu.AdamW(named())
    train(opt, range(3))
    refused(opt, saved, match, (TypeError, ValueError))


@every_maker
def test_every_class_names_what_its_checkpoint_lacks(name: str) -> None:
    """And one in which a state is no dict, or which was read onto the meta device."""
    make = MAKERS[name]
    opt = make(named())
    train(opt, range(3))
    optional = {*opt.optional_states, "micro_step"}
    for key in saved_by(make)["state"][1]:
        saved = saved_by(make)
        del saved["state"][1][key]
        if key in optional:
            make(named()).load_state_dict(saved)
        else:
            refused(opt, saved, f"layer1: the checkpoint lacks '{key}'")
    saved = saved_by(make)
    meta = {i: {k: v.to("meta") for k, v in held.items()} for i, held in saved["state"].items()}
    refused(opt, {**saved, "state": meta}, "layer0: state .*", (TypeError, ValueError))
    refused(opt, {**saved, "state": {**saved["state"], 1: [1.0]}}, "layer1: .* must be a dict", TypeError)


def test_names_of_a_checkpoint_that_has_none_are_places() -> None:
    saved = saved_by(danlu.AdamW)
    del saved["state"][1]["exp_avg"]
    refused(danlu.AdamW(some_params()), saved, r"param_groups\[0\]\['params'\]\[1\]: the checkpoint lacks")


@pytest.mark.parametrize("where", ["before", "after"])
def test_a_hook_that_raises(where: str) -> None:
    """Before loading, nothing has happened; after it, it has."""
    opt, saved = danlu.AdamW(named()), saved_by(danlu.AdamW)

    def fail(*_: Any) -> None:
        raise RuntimeError("a hook")

    if where == "before":
        opt.register_load_state_dict_pre_hook(fail)
        return refused(opt, saved, "a hook", RuntimeError)
    opt.register_load_state_dict_post_hook(fail)
    with pytest.raises(RuntimeError, match="a hook"):
        opt.load_state_dict(saved)
    assert {held["step"].item() for held in opt.state.values()} == {3}
    assert not opt._optimizer_load_state_dict_pre_hooks
    train(opt, range(3, 4))
    return None


def test_state_of_nobody_is_kept_as_it_is() -> None:
    """Under keys that are no parameters'."""
    saved = saved_by(danlu.Lion)
    saved["state"].update({"all": {"rms": [1.0]}, 99: {"exp_avg": torch.ones(2)}, "name": "text"})
    opt = danlu.Lion(some_params())
    opt.load_state_dict(saved)
    assert opt.state["all"] == {"rms": [1.0]}
    assert list(opt.state[99]) == ["exp_avg"]
    assert opt.state["name"] == "text"
    train(opt, range(3, 4))


def test_a_parameter_without_state_starts_anew() -> None:
    """Without any, or with a user's alone."""
    saved = saved_by(danlu.AdamW)
    del saved["state"][0]
    saved["state"][1] = {"sharpness": torch.ones(2)}
    opt = danlu.AdamW(some_params())
    train(opt, range(2))
    opt.load_state_dict(saved)
    train(opt, range(3, 4))
    assert [opt.state[p]["step"].item() for p in parameters(opt)] == [1, 1, 4]


@pytest.mark.parametrize(
    "make",
    [lambda p: danlu.Adafactor(p, lr=1e-3), lambda p: danlu.Amos(p, lr=1e-3)],
    ids=["adafactor", "amos"],
)
def test_a_momentum_may_be_turned_on_in_a_checkpoint(make: Any) -> None:
    saved = saved_by(make)
    saved["param_groups"][0]["beta1" if "beta1" in saved["param_groups"][0] else "momentum"] = 0.9
    opt = make(some_params())
    opt.load_state_dict(saved)
    train(opt, range(3, 4))
    assert {held["step"].item() for held in opt.state.values()} == {4}
    assert all("exp_avg" in held for held in opt.state.values())


def test_lion_without_steps() -> None:
    """As lion-pytorch saves it; the rule does not read them."""
    saved, opt, expected = saved_by(danlu.Lion), danlu.Lion(some_params()), danlu.Lion(some_params())
    expected.load_state_dict(saved_by(danlu.Lion))
    for held in saved["state"].values():
        del held["step"]
    opt.load_state_dict(saved)
    for o in (opt, expected):
        train(o, range(3, 5))
    assert all_same([p.detach() for p in parameters(opt)], [p.detach() for p in parameters(expected)])


def by_apex(saved: dict[str, Any]) -> dict[str, Any]:
    """A state_dict of AdamW as apex's FusedAdam has it: it counts in the group."""
    (group,) = saved["param_groups"]
    for name in ("amsgrad", "maximize"):
        group.pop(name, None)
    group.update(bias_correction=True, step=3)
    for held in saved["state"].values():
        del held["step"]
    return saved


@pytest.mark.parametrize("kind", [danlu.AdamW, danlu.Adam])
def test_steps_that_a_group_has_counted(kind: Any) -> None:
    opt, expected = kind(some_params()), kind(some_params())
    expected.load_state_dict(saved_by(kind))
    opt.load_state_dict(by_apex(saved_by(kind)))
    for o in (opt, expected):
        train(o, range(3, 6))
    assert all_same([p.detach() for p in parameters(opt)], [p.detach() for p in parameters(expected)])
    assert "step" not in opt.param_groups[0]
    uncorrected = by_apex(saved_by(kind))
    uncorrected["param_groups"][0]["bias_correction"] = False
    refused(kind(some_params()), uncorrected, "bias_correction must be True")
    uncounted = by_apex(saved_by(kind))
    uncounted["param_groups"][0]["step"] = None
    refused(kind(named()), uncounted, "layer0: state 'step' must be a number", TypeError)


def test_states_that_are_shared_names_load() -> None:
    """AdamW's into LAMB, and LAMB's into a layer adaptation of AdamW."""
    lamb = danlu.LAMB(some_params())
    lamb.load_state_dict(saved_by(danlu.AdamW))
    adapted = danlu.LayerAdaptation(danlu.AdamW(some_params()))
    adapted.load_state_dict(saved_by(danlu.LAMB))
    lamb.load_state_dict(adapted.state_dict())
    for opt in (lamb, adapted):
        train(opt, range(3, 4))
        assert {held["step"].item() for held in opt.state.values()} == {4}


def test_moments_of_float64_are_rounded() -> None:
    saved = saved_by(danlu.AdamW)
    for held in saved["state"].values():
        held["exp_avg"] = held["exp_avg"].to(F64)
    opt = danlu.AdamW(some_params())
    opt.load_state_dict(saved)
    assert {held["exp_avg"].dtype for held in opt.state.values()} == {F32}


def test_an_expanded_state_is_spread_out() -> None:
    saved = saved_by(danlu.AdamW)
    for held in saved["state"].values():
        held["exp_avg"] = torch.zeros(()).expand(held["exp_avg"].shape)
    opt = danlu.AdamW(some_params())
    opt.load_state_dict(saved)
    train(opt, range(3, 4))
    assert {row.backend for row in opt.backend_report()} == {"cpu"}


@pytest.mark.parametrize("wrap", [danlu.Lazy, danlu.LayerAdaptation])
def test_what_fails_inside_a_wrapper_leaves_both_as_they_were(wrap: Any) -> None:
    saved = saved_by(danlu.AdamW)
    saved["state"][1]["step"] = torch.ones(2)
    inner = danlu.AdamW(named())
    opt = wrap(inner)
    train(opt, range(3))
    refused(opt, saved, "layer1: state 'step'", TypeError)
    refused(inner, saved, "layer1: state 'step'", TypeError)


def test_a_group_that_is_refused_leaves_groups_and_state() -> None:
    opt = danlu.AdamW(named())
    train(opt, range(2))
    before = copies(opt)
    p = torch.nn.Parameter(torch.ones(2))
    for group, kind in (
        ({"params": [p], "lr": -1.0}, ValueError),
        ({"params": [p]}, ValueError),  # without a name, where others have one
        ({"params": [("new", p), ("old", parameters(opt)[0])]}, ValueError),
    ):
        with pytest.raises(kind):
            opt.add_param_group(group)
        assert len(opt.param_groups) == 1
        assert all_same(everything(opt), before)
    train(opt, range(2, 3))


def test_hyper_parameters_that_tell_optimizers_apart_are_listed() -> None:
    kinds = {case.optimizer for case in ALL}
    engine = {"params", "lr", "weight_decay", "engine", "self"}
    for kind in kinds:
        names = set(inspect.signature(kind.__init__).parameters) - engine
        assert names <= checkpoint.TELLING, kind
