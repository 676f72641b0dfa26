"""Parameter groups by kind, type and name: what gets no decay, which learning rate, what is lazy."""

from __future__ import annotations

import copy
import math
import pickle
from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn

import danlu
from cases import ALL, Case
from training import all_same, everything, train


class ChannelNorm(nn.Module):
    """Other libraries' norms are known by the names of their types."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.gain = nn.Parameter(torch.ones(3, 1, 1))
        self.beta = nn.Parameter(torch.ones(()))
        self.mixing = nn.Parameter(torch.ones(3, 2))


class Table(nn.Module):
    """Has an embedding in it."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Embedding(10, 8)
        self.positions = nn.Parameter(torch.ones(4, 8))


class Model(nn.Module):
    """Whose head is tied to its embedding and whose block is there twice; one part is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.table = Table()
        self.block = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
        self.again = self.block
        self.frozen = nn.Linear(8, 8, bias=False).requires_grad_(False)
        self.scale = nn.Parameter(torch.ones(8))
        self.head = nn.Linear(8, 10)
        self.head.weight = self.table.rows.weight


NAMES = [
    "scale",
    "table.positions",
    "table.rows.weight",
    "block.0.weight",
    "block.0.bias",
    "block.1.weight",
    "block.1.bias",
    "head.bias",
]
WITHOUT_DECAY = {"block.0.bias", "block.1.weight", "block.1.bias", "head.bias"}


# a module and those of its parameters that get no decay
MODULES: list[tuple[nn.Module, set[str]]] = [
    (nn.Linear(4, 6), {"bias"}),
    (nn.Bilinear(4, 5, 6), {"bias"}),
    (nn.Conv2d(4, 6, 3), {"bias"}),
    (nn.ConvTranspose1d(4, 6, 3), {"bias"}),
    (nn.Embedding(10, 8), set()),
    (nn.EmbeddingBag(10, 8), set()),
    (nn.LSTM(3, 5), {"bias_ih_l0", "bias_hh_l0"}),
    (nn.GRUCell(3, 5), {"bias_ih", "bias_hh"}),
    (nn.MultiheadAttention(4, 2, add_bias_kv=True), {"in_proj_bias", "out_proj.bias", "bias_k", "bias_v"}),
    (nn.PReLU(), set()),
    (nn.LayerNorm((5, 3)), {"weight", "bias"}),
    (nn.RMSNorm((5, 3)), {"weight"}),
    (nn.GroupNorm(2, 4), {"weight", "bias"}),
    (nn.BatchNorm1d(4), {"weight", "bias"}),
    (nn.BatchNorm3d(4), {"weight", "bias"}),
    (nn.SyncBatchNorm(4), {"weight", "bias"}),
    (nn.InstanceNorm2d(4, affine=True), {"weight", "bias"}),
    (ChannelNorm(), {"weight", "gain", "beta"}),
    (nn.ParameterDict({"bias": torch.ones(3), "gain": torch.ones(3)}), {"bias"}),
]


@pytest.mark.parametrize("weight_decay", [0.1, None])
@pytest.mark.parametrize(("module", "undecayed"), MODULES, ids=lambda x: type(x).__name__)
def test_no_decay_by_kind(module: nn.Module, undecayed: set[str], weight_decay: float | None) -> None:
    for prefix, model in (
        ("", module),
        ("bias.norm.", nn.ModuleDict({"bias": nn.ModuleDict({"norm": module})})),
    ):
        groups = danlu.param_groups(model, weight_decay)
        assert_whole(groups, model)
        without = {row.name.removeprefix(prefix) for row in groups.rows if row.weight_decay == 0}
        assert without == undecayed
        opt = danlu.AdamW(groups, weight_decay=0.3)
        for group in opt.param_groups:
            for name in group["param_names"]:
                decay = 0.0 if name.removeprefix(prefix) in undecayed else weight_decay or 0.3
                assert group["weight_decay"] == decay


def assert_whole(groups: Any, model: nn.Module) -> None:
    """Each trained parameter once, in the model's order, with what its row says; no two groups are alike."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    rows = {row.name: row for row in groups.rows}
    assert [row.name for row in groups.rows] == list(trained)
    settings = [{k: v for k, v in group.items() if k not in ("params", "param_names")} for group in groups]
    assert all(a != b for i, a in enumerate(settings) for b in settings[:i])
    firsts = []
    found = set()
    for index, (group, setting) in enumerate(zip(groups, settings, strict=True)):
        order = [list(trained).index(name) for name in group["param_names"]]
        assert order == sorted(order)
        firsts.append(order[0])
        for name, p in zip(group["param_names"], group["params"], strict=True):
            row = rows[name]
            assert p is trained[name]
            assert (row.group, row.shape) == (index, tuple(p.shape))
            assert (row.weight_decay, row.lazy) == (setting.get("weight_decay"), setting.get("lazy", False))
            found.add(name)
    assert firsts == sorted(firsts)
    assert found == set(trained)


Found = dict[str, tuple[float, float, bool]]
DEFAULT: Found = {name: (0.0 if name in WITHOUT_DECAY else 0.1, 1.0, False) for name in NAMES}

# options, and the weight_decay, lr_scale and lazy of those parameters that they change
OPTIONS: list[tuple[dict[str, Any], Found]] = [
    ({}, {}),
    (dict(no_decay=["scale"]), {"scale": (0.0, 1.0, False)}),
    (dict(no_decay=[r"bias$"]), {}),
    (dict(no_decay=[nn.Embedding]), {"table.rows.weight": (0.0, 1.0, False)}),
    # by any name of a tied one, and by all that owns it
    (dict(no_decay={"^head.weight"}), {"table.rows.weight": (0.0, 1.0, False)}),
    (dict(no_decay=["^again.0.weight"]), {"block.0.weight": (0.0, 1.0, False)}),
    (
        dict(no_decay=(nn.Linear,)),
        {"table.rows.weight": (0.0, 1.0, False), "block.0.weight": (0.0, 1.0, False)},
    ),
    # what is in a module of that type, however deep
    (
        dict(lazy=[Table]),
        {"table.rows.weight": (0.1, 1.0, True), "table.positions": (0.1, 1.0, True)},
    ),
    (
        dict(lr_scale={Model: 0.5}),
        {name: (decay, 0.5, lazy) for name, (decay, _, lazy) in DEFAULT.items()},
    ),
    (dict(lr_scale={"scale": 0}), {"scale": (0.1, 0.0, False)}),
    # two patterns may agree
    (
        dict(lr_scale={r"block\.0": 3, r"block.*bias": 3.0, "0.*bias": 3}),
        {
            "block.0.weight": (0.1, 3.0, False),
            "block.0.bias": (0.0, 3.0, False),
            "block.1.bias": (0.0, 3.0, False),
        },
    ),
    (dict(lr_scale={"frozen": 3.0}, lazy=["frozen"], no_decay=["frozen"]), {}),
    (
        dict(
            no_decay=["scale", "positions"],
            lazy=["rows", nn.LayerNorm],
            lr_scale={nn.LayerNorm: 2, "^head.b": 4},
        ),
        {
            "scale": (0.0, 1.0, False),
            "table.positions": (0.0, 1.0, False),
            "table.rows.weight": (0.1, 1.0, True),
            "block.1.weight": (0.0, 2.0, True),
            "block.1.bias": (0.0, 2.0, True),
            "head.bias": (0.0, 4.0, False),
        },
    ),
]


@pytest.mark.parametrize(("options", "changed"), OPTIONS, ids=lambda x: ",".join(x))
def test_options(options: dict[str, Any], changed: Found) -> None:
    model = Model()
    groups = danlu.param_groups(model, 0.1, lr=0.5, **options)
    assert_whole(groups, model)
    found = {row.name: (row.weight_decay, row.lr_scale, row.lazy) for row in groups.rows}
    assert found == {**DEFAULT, **changed}
    for row in groups.rows:
        group = groups[row.group]
        assert group["lr"] == 0.5 * row.lr_scale
        assert group.keys() == {"params", "param_names", "weight_decay", "lr"} | (
            {"lazy"} if row.lazy else set()
        )


def test_what_is_not_given_is_the_optimizers() -> None:
    groups = danlu.param_groups(Model())
    assert [group.keys() - {"params", "param_names"} for group in groups] == [set(), {"weight_decay"}]
    assert len(danlu.param_groups(Model(), 0.0)) == 1
    assert danlu.param_groups(nn.ReLU(), 0.1) == []
    assert danlu.param_groups(Model().frozen, 0.1) == []


def test_the_table() -> None:
    options: dict[str, Any] = dict(no_decay=[nn.Embedding], lazy=["rows"], lr_scale={"table": 10}, lr=1.0)
    assert str(danlu.param_groups(Model(), **options)).splitlines() == [
        "parameter          shape    group  weight_decay  lr_scale  lazy  rules",
        "scale              (8,)     0      optimizer's   1         no    unknown",
        "table.positions    (4, 8)   1      optimizer's   10        no    unknown, lr_scale 'table'",
        "table.rows.weight  (10, 8)  2      0             10        yes   "
        "embedding, no_decay Embedding, lr_scale 'table', lazy 'rows'",
        "block.0.weight     (8, 8)   0      optimizer's   1         no    kernel",
        "block.0.bias       (8,)     3      0             1         no    bias",
        "block.1.weight     (8,)     3      0             1         no    norm gain",
        "block.1.bias       (8,)     3      0             1         no    bias",
        "head.bias          (10,)    3      0             1         no    bias",
    ]
    assert " 0.1 " in str(danlu.param_groups(Model(), 0.1))


def marked(model: nn.Module) -> Any:
    return danlu.param_groups(model, 0.1, lazy=[nn.Embedding], lr_scale={"block": 3.0}, lr=2e-3)


@pytest.mark.parametrize("case", ALL, ids=lambda c: c.id)
def test_every_optimizer_takes_them(case: Case) -> None:
    """As groups written by hand, marks and names included, and again after saving and loading."""
    torch.manual_seed(0)
    model = Model()
    by_hand, loaded = copy.deepcopy(model), copy.deepcopy(model)
    opt = case.make(marked(model))
    written = [
        dict(params=[by_hand.scale, by_hand.table.positions], weight_decay=0.1, lr=2e-3),
        dict(params=[by_hand.table.rows.weight], weight_decay=0.1, lr=2e-3),
        dict(params=[by_hand.block[0].weight], weight_decay=0.1, lr=6e-3),
        dict(params=[by_hand.block[0].bias, *by_hand.block[1].parameters()], weight_decay=0.0, lr=6e-3),
        dict(params=[by_hand.head.bias], weight_decay=0.0, lr=2e-3),
    ]
    plain = case.make(written)
    for both in (opt, plain):
        train(both, range(4))
    assert all_same(everything(opt), everything(plain))
    again = case.make(danlu.param_groups(loaded, 0.1, lazy=[nn.Embedding], lr_scale={"block": 3.0}, lr=1.0))
    loaded.load_state_dict(model.state_dict())
    again.load_state_dict(pickle.loads(pickle.dumps(opt.state_dict())))
    for both in (opt, again):
        train(both, range(4, 6))
        assert [group.get("lazy") for group in both.param_groups] == [None, True, None, None, None]
    assert all_same(everything(opt), everything(again))


TORCHS = [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adafactor, torch.optim.NAdam, torch.optim.RMSprop]


@pytest.mark.parametrize("optimizer", TORCHS)
def test_torchs_optimizers_take_them(optimizer: Any) -> None:
    opt = optimizer(marked(Model()), lr=1.0)
    train(opt, range(2))
    saved = opt.state_dict()
    again = optimizer(marked(Model()), lr=1.0)
    again.load_state_dict(saved)
    assert [group["lr"] for group in again.param_groups] == [2e-3, 2e-3, 6e-3, 6e-3, 2e-3]
    assert [group.get("lazy") for group in again.param_groups] == [None, True, None, None, None]


def test_errors_and_reports_of_optimizers_have_the_names() -> None:
    model = Model()
    opt = danlu.Lion(marked(model), lr=1.0)
    assert Counter(row.name for row in opt.backend_report()) == Counter(NAMES)
    model.table.rows.weight.grad = torch.ones(10, 8).to_sparse()
    with pytest.raises(TypeError, match=r"^table.rows.weight: the gradient is sparse"):
        opt.step()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            dict(no_decay=["scale", "nowhere"]),
            "no_decay: the pattern 'nowhere' is found in no parameter's name",
        ),
        (dict(lazy=["^rows"]), r"lazy: the pattern '\^rows' is found in no parameter's name"),
        (dict(lr_scale={"heads": 1.0}), "lr_scale: the pattern 'heads' is found in no parameter's name"),
        (dict(no_decay=[nn.Conv2d]), "no_decay: the pattern Conv2d is found in no parameter's modules"),
        (
            dict(lr_scale={"block": 2, "again.*1.w": 3.0, "1.weight": 2}),
            "^block.1.weight: lr_scale gives 2.0 by 'block' and 3.0 by 'again.*1.w'",
        ),
        (
            dict(lr_scale={Table: 0.5, nn.Embedding: 0.1}),
            "^table.rows.weight: lr_scale gives 0.5 by Table and 0.1 by Embedding",
        ),
        (dict(lr_scale={"scale": -1.0}), r"lr_scale\['scale'\] must be finite and at least 0, got -1.0"),
        (dict(lr_scale={nn.Linear: None}), r"lr_scale\[Linear\] must be a number, got None"),
        (dict(lr_scale=["scale"]), r"lr_scale must be a dict {pattern: factor}, got \['scale'\]"),
        (dict(lr_scale={"scale": 2.0}, lr=None), "lr must be given with lr_scale, which multiplies it, got"),
        (dict(lr=math.inf), "lr must be finite and at least 0"),
        (dict(lr=torch.tensor(0.1)), "lr must be a number"),
        (dict(weight_decay=-0.1), "weight_decay must be finite and at least 0"),
        (dict(no_decay="scale"), "no_decay must be a list of patterns, got 'scale'"),
        (dict(lazy=nn.Embedding), "lazy must be a list of patterns, got <class"),
        (dict(no_decay=["("]), r"no_decay: '\(' is neither a regular expression nor a type of modules"),
        (dict(no_decay=[int]), "no_decay: <class 'int'> is neither a regular expression nor"),
        (dict(lazy=[nn.Embedding(2, 2)]), r"lazy: Embedding\(2, 2\) is neither a regular expression nor"),
    ],
)
def test_mistakes(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        danlu.param_groups(Model(), **{"weight_decay": 0.1, "lr": 1e-3, **options})


def test_a_schedule_keeps_the_factors() -> None:
    opt = danlu.Lion(marked(Model()))
    schedule = danlu.PiecewiseLinearLR(opt, {2: 1.0})
    for t, lr in enumerate((0.0, 1e-3, 2e-3, 2e-3)):
        assert [group["lr"] for group in opt.param_groups] == [lr, lr, 3 * lr, 3 * lr, lr]
        train(opt, [t])
        schedule.step()
