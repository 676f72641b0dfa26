"""Parameter groups by module type, for Amos and from its analysis."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import danlu
from cases import values
from training import train

Dims = tuple[int, ...] | None


class CustomNorm(nn.Module):
    """Norms of other libraries have types of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.channels = nn.Parameter(torch.ones(3, 1, 1))
        self.table = nn.Parameter(torch.ones(2, 3))


class Free(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.ones(1, 1, 9))
        self.scale = nn.Parameter(torch.ones(3))
        self.temperature = nn.Parameter(torch.ones(()))
        self.out_bias = nn.Parameter(torch.ones(4))


Found = dict[str, tuple[str, float, Dims]]

# a module, and rule, eta squared, reduce_dims of its parameters
MODULES: list[tuple[nn.Module, Found]] = [
    (nn.Linear(4, 6), dict(weight=("kernel", 1 / 4, (1,)), bias=("bias", 0.25, None))),
    (nn.Embedding(10, 8), dict(weight=("embedding", 2 / 8, (1,)))),
    (nn.EmbeddingBag(10, 8), dict(weight=("embedding", 2 / 8, (1,)))),
    (nn.LayerNorm(5), dict(weight=("norm gain", 1.0, None), bias=("bias", 0.25, None))),
    (nn.LayerNorm((5, 3)), dict(weight=("norm gain", 1.0, None), bias=("bias", 0.25, None))),
    (nn.RMSNorm(5), dict(weight=("norm gain", 1.0, None))),
    (nn.GroupNorm(2, 4), dict(weight=("norm gain", 1.0, None), bias=("bias", 0.25, None))),
    (nn.BatchNorm2d(4), dict(weight=("norm gain", 1.0, None), bias=("bias", 0.25, None))),
    (nn.InstanceNorm1d(4, affine=True), dict(weight=("norm gain", 1.0, None), bias=("bias", 0.25, None))),
    (
        CustomNorm(),
        dict(
            weight=("norm gain", 1.0, None),
            channels=("norm gain", 1.0, None),
            table=("unknown", 1 / 3, None),
        ),
    ),
    (nn.Conv1d(6, 9, 4), dict(weight=("kernel", 1 / 24, (1, 2)), bias=("bias", 0.25, None))),
    (
        nn.Conv2d(6, 9, (2, 5), groups=3),
        dict(weight=("kernel", 1 / 20, (1, 2, 3)), bias=("bias", 0.25, None)),
    ),
    (nn.ConvTranspose1d(6, 9, 4), dict(weight=("kernel", 1 / 24, (0, 2)), bias=("bias", 0.25, None))),
    (
        nn.ConvTranspose2d(6, 9, (2, 5), groups=3),
        dict(weight=("kernel", 1 / 20, (0, 2, 3)), bias=("bias", 0.25, None)),
    ),
    (
        nn.MultiheadAttention(4, 2),
        {
            "in_proj_weight": ("kernel", 1 / 4, (1,)),
            "in_proj_bias": ("bias", 0.25, None),
            "out_proj.weight": ("kernel", 1 / 4, (1,)),
            "out_proj.bias": ("bias", 0.25, None),
        },
    ),
    (
        nn.MultiheadAttention(4, 2, kdim=3, vdim=5, bias=False, add_bias_kv=True),
        {
            "q_proj_weight": ("kernel", 1 / 4, (1,)),
            "k_proj_weight": ("kernel", 1 / 3, (1,)),
            "v_proj_weight": ("kernel", 1 / 5, (1,)),
            "out_proj.weight": ("kernel", 1 / 4, (1,)),
            "bias_k": ("bias", 0.25, None),
            "bias_v": ("bias", 0.25, None),
        },
    ),
    (
        nn.GRUCell(3, 5),
        dict(
            weight_ih=("kernel", 1 / 3, (1,)),
            weight_hh=("kernel", 1 / 5, (1,)),
            bias_ih=("bias", 0.25, None),
            bias_hh=("bias", 0.25, None),
        ),
    ),
    (
        nn.LSTM(3, 5, bias=False),
        dict(weight_ih_l0=("kernel", 1 / 3, (1,)), weight_hh_l0=("kernel", 1 / 5, (1,))),
    ),
    (
        Free(),
        dict(
            token=("unknown", 1 / 9, None),
            scale=("unknown", 0.25, None),
            temperature=("unknown", 0.25, None),
            out_bias=("bias", 0.25, None),
        ),
    ),
]


@pytest.mark.parametrize(("module", "expected"), MODULES, ids=lambda x: type(x).__name__)
def test_every_kind_of_module(module: nn.Module, expected: Found) -> None:
    for prefix, model in (("", module), ("bias.", nn.ModuleDict({"bias": module}))):
        groups = danlu.amos_groups(model)
        assert {row.name.removeprefix(prefix): (row.rule, row.reduce_dims) for row in groups.rows} == {
            name: (rule, dims) for name, (rule, _, dims) in expected.items()
        }
        for row in groups.rows:
            assert row.eta**2 == pytest.approx(expected[row.name.removeprefix(prefix)][1], rel=1e-15)
        assert_groups_are_rows(groups, dict(model.named_parameters()))


def assert_groups_are_rows(groups: Any, params: dict[str, nn.Parameter]) -> None:
    """The groups hold what the rows say, each parameter once, and no two of them are alike."""
    rows = {row.name: (row.eta, row.reduce_dims) for row in groups.rows}
    assert rows.keys() == params.keys()
    settings = [(group["eta"], group["reduce_dims"]) for group in groups]
    assert len(set(settings)) == len(settings)
    held = [
        (name, p, setting)
        for group, setting in zip(groups, settings, strict=True)
        for name, p in zip(group["param_names"], group["params"], strict=True)
    ]
    assert sorted(name for name, *_ in held) == sorted(params)
    for name, p, setting in held:
        assert p is params[name]
        assert setting == rows[name]


class Tied(nn.Module):
    """A language model whose head comes first, and is the embedding, too."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 10)
        self.embed = nn.Embedding(10, 8)
        self.mlp = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8))
        self.again = self.mlp
        self.head.weight = self.embed.weight


def test_tied_parameters_are_taken_once() -> None:
    model = Tied()
    groups = danlu.amos_groups(model)
    assert_groups_are_rows(groups, dict(model.named_parameters()))
    assert {row.name: row.rule for row in groups.rows}["head.weight"] == "embedding"
    # by any of its names
    for pattern in ("^embed", "^head.weight"):
        assert danlu.amos_groups(model, eta={pattern: 0.1}).rows[0].eta == 0.1
    assert danlu.amos_groups(model, eta={"^again.0.weight": 0.1}).rows[2].eta == 0.1
    # or by the types of the modules that it is in
    found = {
        row.name: row.eta for row in danlu.amos_groups(model, eta={nn.Embedding: 0.2, nn.Linear: 0.1}).rows
    }
    assert (found["head.weight"], found["head.bias"]) == (0.2, 0.1)


def test_overrides() -> None:
    model = Tied()
    groups = danlu.amos_groups(
        model,
        eta={r"mlp\.0": 0.3, r"weight$": 0.7},
        reduce_dims={r"mlp\.0\.weight": (-2,), "embed": None, r"2\.weight": ()},
        mlp_outputs=[r"mlp\.2"],
    )
    found = {row.name: (row.rule, row.eta, row.reduce_dims) for row in groups.rows}
    assert found == {
        "head.weight": ("embedding", 0.7, None),
        "head.bias": ("bias", 0.5, None),
        "mlp.0.weight": ("kernel", 0.3, (-2,)),
        "mlp.0.bias": ("bias", 0.3, None),
        "mlp.2.weight": ("mlp output", 0.7, ()),
        "mlp.2.bias": ("bias", 0.5, None),
    }
    assert_groups_are_rows(groups, dict(model.named_parameters()))
    (row,) = (
        row for row in danlu.amos_groups(model, mlp_outputs=[r"mlp\.2"]).rows if row.rule == "mlp output"
    )
    assert row.eta == pytest.approx(math.sqrt(2 / 32), rel=1e-15)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            dict(eta={"embed": 0.1, "nowhere": 0.1}),
            "eta: the pattern 'nowhere' is found in no parameter's name",
        ),
        (dict(reduce_dims={"^bias": ()}), "reduce_dims: the pattern '.bias' is found in no"),
        (dict(mlp_outputs=["fc2"]), "mlp_outputs: the pattern 'fc2' is found in no"),
        (dict(mlp_outputs="mlp.2"), "mlp_outputs must be a sequence of patterns, got 'mlp.2'"),
        (dict(mlp_outputs=["bias"]), "mlp_outputs: the pattern 'bias' is found in no"),
        (dict(eta={"embed": -0.1}), r"eta\['embed'\] must be finite and at least 0"),
        (dict(eta={"embed": None}), r"eta\['embed'\] must be a number"),
        (dict(reduce_dims={"bias": 1}), r"reduce_dims\['bias'\] must be a tuple of integers or None, got 1"),
        (dict(reduce_dims={"bias": (1,)}), r"^head.bias: reduce_dims must be dimensions .* has 1, got 1"),
    ],
)
def test_overrides_that_mean_nothing(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        danlu.amos_groups(Tied(), **overrides)


def test_amos_takes_them() -> None:
    model = Tied()
    groups = danlu.amos_groups(model)
    opt = danlu.Amos(groups, lr=0.05)
    train(opt, range(2))
    states = {name: opt.state[p]["variance"].shape for name, p in model.named_parameters()}
    assert states["head.weight"] == (10, 1)
    assert states["mlp.0.weight"] == (32, 1)
    assert states["mlp.0.bias"] == (1,)
    assert all(row.name in dict(model.named_parameters()) for row in opt.backend_report())


def test_shapes_are_all_that_is_read() -> None:
    with torch.device("meta"):
        groups = danlu.amos_groups(Tied())
    assert str(groups) == str(danlu.amos_groups(Tied()))


def test_the_table() -> None:
    lines = str(danlu.amos_groups(nn.Sequential(nn.Embedding(10, 8), nn.Conv1d(8, 3, 2)))).splitlines()
    assert lines == [
        "parameter  shape      rule       eta   reduce_dims",
        "0.weight   (10, 8)    embedding  0.5   (1,)",
        "1.weight   (3, 8, 2)  kernel     0.25  (1, 2)",
        "1.bias     (3,)       bias       0.5   all",
    ]


# Su's strategy.


def test_strategy() -> None:
    model = Tied()
    alpha0 = 0.02
    groups, scheduler = danlu.amos_strategy(model, alpha0, half_life=100)
    params = dict(model.named_parameters())
    assert sorted(name for group in groups for name in group["param_names"]) == sorted(params)
    for group in groups:
        for name, p in zip(group["param_names"], group["params"], strict=True):
            assert p is params[name]
            sigma = p.std(correction=0).item() if p.ndim > 1 else 0.5
            # rounded to 3 digits
            assert group["lr"] == pytest.approx(alpha0 * sigma, rel=5e-3)
            assert group["lr"] * group["weight_decay"] == pytest.approx(alpha0**2 / 2, rel=1e-12)
    (biases,) = (group for group in groups if "head.bias" in group["param_names"])
    assert biases["param_names"] == ["head.bias", "mlp.0.bias", "mlp.2.bias"]
    assert biases["lr"] == alpha0 * 0.5
    assert biases["weight_decay"] == alpha0 / (2 * 0.5)

    opt = danlu.Lion(groups)
    starts = [group["lr"] for group in groups]
    schedule = scheduler(opt)
    factors = {}
    for t in range(301):
        factors[t] = {group["lr"] / start for group, start in zip(opt.param_groups, starts, strict=True)}
        train(opt, [t])
        schedule.step()
    for t, factor in {0: 1.0, 1: 100 / 101, 100: 0.5, 300: 0.25}.items():
        assert all(found == pytest.approx(factor, rel=1e-12) for found in factors[t])


def test_steps_are_relative_to_sigma() -> None:
    """A step of Lion without decay is alpha0 of the parameter's scale; of another rms, so with step_rms."""
    model = nn.Linear(30, 40, bias=False)
    (group,), _ = danlu.amos_strategy(model, 0.01, half_life=10)
    before = model.weight.detach().clone()
    model.weight.grad = values((40, 30), 0, wild=False)
    danlu.Lion([dict(group, weight_decay=0.0)]).step()
    moved = (model.weight - before).square().mean().sqrt().item()
    assert moved == pytest.approx(0.01 * before.std().item(), rel=1e-2)

    (other,), _ = danlu.amos_strategy(model, 0.01, half_life=10, step_rms=0.2)
    (group,), _ = danlu.amos_strategy(model, 0.01, half_life=10)
    assert other["lr"] == pytest.approx(5 * group["lr"], rel=1e-12)
    assert other["lr"] * other["weight_decay"] == pytest.approx(0.01**2 / 2, rel=1e-12)


def test_the_schedule_resumes() -> None:
    groups, scheduler = danlu.amos_strategy(Tied(), half_life=10)
    opt = danlu.AdamW(groups)
    schedule = scheduler(opt)
    for t in range(5):
        train(opt, [t])
        schedule.step()
    pickle.dumps(schedule.lr_lambdas)
    again = danlu.AdamW(copy.deepcopy([dict(group) for group in opt.param_groups]))
    loaded = scheduler(again)
    loaded.load_state_dict(schedule.state_dict())
    for both in (opt, again):
        train(both, [5])
    schedule.step()
    loaded.step()
    assert [group["lr"] for group in again.param_groups] == [group["lr"] for group in opt.param_groups]


def test_sigma_overrides() -> None:
    model = Tied()
    nn.init.zeros_(model.mlp[2].weight)
    with pytest.raises(ValueError, match=r"^mlp.2.weight: a standard deviation of 0.0 is no scale"):
        danlu.amos_strategy(model, half_life=10)
    sigma = {"2.weight$": 0.1, "2": 0.2, nn.Embedding: 0.3}
    strategy = danlu.amos_strategy(model, half_life=10, sigma=sigma)
    found = {row.name: row.sigma for row in strategy.rows}
    assert (found["mlp.2.weight"], found["mlp.2.bias"], found["head.weight"]) == (0.1, 0.2, 0.3)
    lines = str(strategy).splitlines()
    assert lines[0].split() == ["parameter", "shape", "sigma", "lr", "weight_decay"]
    assert lines[1].split() == ["head.weight", "(10,", "8)", "0.3", "0.0003", "0.00166667"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(alpha0=0.0), "alpha0 must be greater than 0, got 0"),
        (dict(alpha0=-1.0), "alpha0 must be finite and at least 0"),
        (dict(half_life=0), "half_life must be greater than 0, got 0"),
        (dict(half_life=math.inf), "half_life must be finite"),
        (dict(step_rms=0.0), "step_rms must be greater than 0"),
        (dict(sigma={"head": 0.0}), r"sigma\['head'\] must be greater than 0"),
        (dict(sigma={"nowhere": 1.0}), "sigma: the pattern 'nowhere' is found in no parameter's name"),
    ],
)
def test_strategy_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        danlu.amos_strategy(Tied(), **{"half_life": 10, **options})


def constant(value: float) -> nn.Module:
    model = nn.Linear(3, 2, bias=False)
    nn.init.constant_(model.weight, value)
    return model


@pytest.mark.parametrize(
    ("model", "deviation"),
    [
        (constant(0.0), "0.0"),
        (constant(2.0), "0.0"),
        (constant(math.nan), "nan"),
        (nn.Linear(1, 1, bias=False), "0.0"),
        (nn.Linear(3, 2, bias=False, device="meta"), "nan"),
        (nn.ParameterDict({"weight": torch.zeros(3, 0)}), "nan"),
    ],
)
def test_no_scale_to_measure(model: nn.Module, deviation: str) -> None:
    with pytest.raises(ValueError, match=f"^weight: a standard deviation of {deviation} is no scale; sigma"):
        danlu.amos_strategy(model, half_life=10)
    assert danlu.amos_strategy(model, half_life=10, sigma={"weight": 0.1}).rows[0].sigma == 0.1
