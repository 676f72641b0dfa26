"""Adafactor: its presets against the libraries they are named after, and what these have saved."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import danlu
from cases import BF16, F32, F64, values
from danlu.sharding import reduced_shape
from danlu.testing import same_bits
from oracles.bert4keras_adafactor import Bert4KerasAdafactor
from oracles.jax_optimizers import Run, trajectories
from oracles.submodules import load

STEPS = 12
SHAPES = [(), (1,), (7,), (1, 9), (9, 1), (33, 40), (130, 140), (3, 5, 7), (2, 3, 4, 5), (130, 128, 1, 3)]
# Largest difference over largest value. An update follows from sums in another order; optax folds its decay
# rate in fp32.
EXACT, OPTAX = 1e-14, 1e-7

STUBS = [f"transformers.{name}" for name in ("trainer_pt_utils", "trainer_utils", "utils")]
HuggingFace = load("transformers.optimization", STUBS).Adafactor
BigVision = load("timm.optim.adafactor_bv").AdafactorBigVision


def big_vision(params: list[torch.Tensor], min_dim_size_to_factor: int = 32, **options: Any) -> Any:
    return BigVision(
        params,
        min_dim_size_to_factor=min_dim_size_to_factor,
        unscaled_wd=True,
        momentum_dtype=torch.float64,
        **options,
    )


# preset, our options, the library's optimizer with its own
LIBRARIES: dict[str, tuple[str, dict[str, Any], Callable[[list[torch.Tensor]], Any]]] = {
    "huggingface": ("huggingface", {}, HuggingFace),
    "huggingface-momentum": (
        "huggingface",
        dict(beta1=0.8, weight_decay=0.1, warmup_init=True),
        lambda ps: HuggingFace(ps, beta1=0.8, weight_decay=0.1, warmup_init=True),
    ),
    "huggingface-lr": (
        "huggingface",
        dict(lr=1e-2, scale_parameter=False, clip_threshold=0.5, decay_rate=-0.6, eps=(1e-20, 1e-2)),
        lambda ps: HuggingFace(
            ps,
            lr=1e-2,
            scale_parameter=False,
            relative_step=False,
            clip_threshold=0.5,
            decay_rate=-0.6,
            eps=(1e-20, 1e-2),
        ),
    ),
    "torch": ("torch", dict(weight_decay=0.1), lambda ps: torch.optim.Adafactor(ps, weight_decay=0.1)),
    "torch-options": (
        "torch",
        dict(lr=0.3, eps=(1e-10, 1e-2), clip_threshold=1.5, decay_rate=-0.6),
        lambda ps: torch.optim.Adafactor(ps, lr=0.3, eps=(1e-10, 1e-2), d=1.5, beta2_decay=-0.6),
    ),
    "big_vision": (
        "big_vision",
        dict(lr=1e-2, weight_decay=1e-3),
        lambda ps: big_vision(ps, lr=1e-2, weight_decay=1e-3),
    ),
    "big_vision-plain": (
        "big_vision",
        dict(lr=1e-2, beta1=None, decay_rate=-0.6),
        lambda ps: big_vision(ps, lr=1e-2, momentum=None, decay_rate=0.6),
    ),
}

GRADIENTS: dict[str, float] = {"": 1.0, "tiny": 1e-20, "huge": 1e10, "zero": 0.0}


def gradient(shape: tuple[int, ...], t: int, scale: float) -> torch.Tensor:
    """In float64; its first row is zero where there are others."""
    g = values(shape, 100 + t, wild=False).double() * scale
    if len(shape) > 1 and shape[-2] > 1:
        g[..., 0, :] = 0.0
    return g


def difference(ours: torch.Tensor, theirs: torch.Tensor, past: float = 0.0) -> float:
    """By the largest value, now or in the past; NaN, which is below no bound, where there is one."""
    error = (ours.double() - theirs.double()).abs().max().item()
    return error / largest if (largest := max(theirs.double().abs().max().item(), past)) else error


@pytest.mark.parametrize(
    ("library", "size"),
    [
        pytest.param(library, size, marks=pytest.mark.full if size and (i + j) % 2 else ())
        for i, library in enumerate(LIBRARIES)
        for j, size in enumerate([*GRADIENTS, "zero parameters"])
    ],
)
def test_same_trajectory_as_the_library(library: str, size: str) -> None:
    preset, options, make = LIBRARIES[library]
    for i, shape in enumerate(SHAPES):
        start = 0.0 if size == "zero parameters" else 0.02
        p = torch.nn.Parameter(start * values(shape, i, wild=False).double())
        q = torch.nn.Parameter(p.detach().clone())
        ours, theirs = danlu.Adafactor([p], preset=preset, **options), make([q])
        largest = 0.0
        for t in range(STEPS):
            p.grad = gradient(shape, t, GRADIENTS.get(size, 1.0))
            q.grad = p.grad.clone()
            largest = max(largest, q.abs().max().item())
            ours.step()
            theirs.step()
            assert difference(p, q, largest) < EXACT, (shape, t)


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.full)], ids=["some", "every"])
def test_same_trajectory_as_optax(every: bool, tmp_path: Path) -> None:
    """jax compiles for each shape: without --all every second one, and all sizes for the first settings."""
    variants: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({}, dict(learning_rate=None)),
        (
            dict(lr=0.3, beta1=0.9, weight_decay=1e-3, clip_threshold=0.5, decay_rate=-0.6),
            dict(momentum=0.9, weight_decay_rate=1e-3, clipping_threshold=0.5, decay_rate=0.6),
        ),
        (dict(lr=1e-2, scale_parameter=False), dict(multiply_by_parameter_scale=False)),
        *(
            (dict(lr=1e-2, beta1=0.9, **size), dict(momentum=0.9, **size))
            for size in (dict(min_dim_size_to_factor=n) for n in (2, 32))
        ),
    ]
    runs, finals = [], []
    for options, theirs in variants:
        sizes = "min_dim_size_to_factor" in options
        for i, shape in enumerate(SHAPES[5:] if sizes else SHAPES):
            if i % 2 and not every:
                continue
            some = sizes or (options and not every)
            for scale in [1.0] if some else GRADIENTS.values():
                gradients = torch.stack([gradient(shape, t, scale) for t in range(STEPS)])
                p = torch.nn.Parameter(0.02 * values(shape, i, wild=False).double())
                hyper = dict(theirs, dtype_momentum="float64")
                lrs = [options.get("lr") or 1.0] * STEPS
                hyper.pop("learning_rate", None)
                runs.append(Run("adafactor", p.detach().numpy().copy(), gradients.numpy(), lrs, hyper))
                opt = danlu.Adafactor([p], preset="optax", **options)
                for g in gradients:
                    p.grad = g.clone()
                    opt.step()
                finals.append(p.detach())
    for run, found, ours in zip(runs, trajectories(tmp_path, runs), finals, strict=True):
        assert difference(ours, torch.tensor(found["p"][-1])) < OPTAX, (run.start.shape, run.hyper)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({}, {}),
        (dict(lr=None), dict(lr=None)),
        (dict(lr=None, scale_parameter=False), dict(lr=None, multiply_by_parameter_scale=False)),
        (
            dict(beta1=0.9, clip_threshold=None, eps=(1e-3, 0.1)),
            dict(beta1=0.9, clipping_threshold=None, epsilon1=1e-3, epsilon2=0.1),
        ),
    ],
)
def test_same_trajectory_as_bert4keras(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    for i, shape in enumerate(SHAPES):
        for scale in GRADIENTS.values():
            p = torch.nn.Parameter(0.02 * values(shape, i, wild=False).double())
            q = p.detach().numpy().copy()
            opt, oracle = danlu.Adafactor([p], preset="bert4keras", **ours), Bert4KerasAdafactor(**theirs)
            for t in range(STEPS):
                p.grad = gradient(shape, t, scale)
                q = oracle.step(q, p.grad.numpy())
                opt.step()
            assert difference(p, torch.tensor(q), past=0.02) < EXACT, (shape, scale)


@pytest.mark.parametrize("size", [2, 32, 128])
def test_same_trajectory_from_another_size(size: int) -> None:
    """As big_vision and bert4keras; optax is above."""
    smallest: dict[str, Any] = dict(min_dim_size_to_factor=size)
    for i, shape in enumerate(SHAPES[5:]):
        p, r = (torch.nn.Parameter(0.02 * values(shape, i, wild=False).double()) for _ in range(2))
        q, s = torch.nn.Parameter(p.detach().clone()), r.detach().numpy().copy()
        opt = danlu.Adafactor([p], preset="big_vision", lr=1e-2, **smallest)
        theirs = big_vision([q], lr=1e-2, **smallest)
        rooted = danlu.Adafactor([r], preset="bert4keras", beta1=0.9, **smallest)
        oracle = Bert4KerasAdafactor(beta1=0.9, **smallest)
        for t in range(8):
            for x in (p, q, r):
                x.grad = gradient(shape, t, 1.0)
            opt.step()
            theirs.step()
            rooted.step()
            s = oracle.step(s, gradient(shape, t, 1.0).numpy())
        assert difference(p, q) < EXACT, shape
        assert difference(r, torch.tensor(s), past=0.02) < EXACT, shape


@pytest.mark.pairs
@pytest.mark.parametrize("preset", ["huggingface", "torch", "optax", "big_vision", "bert4keras"])
@pytest.mark.parametrize("size", GRADIENTS)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_fp32_follows_float64(preset: str, size: str, backend: str) -> None:
    options: dict[str, Any] = {"lr": 1e-2} if preset == "big_vision" else {}
    if preset == "torch":
        options["eps"] = (1e-7, 1e-3)
    for i, shape in enumerate([*SHAPES, (3, 130, 700)]):
        p = torch.nn.Parameter(0.02 * values(shape, i, wild=False))
        q = torch.nn.Parameter(p.detach().double())
        engine: dict[str, Any] = dict(state_dtype=F32, backend=backend)
        opt, exact = (danlu.Adafactor([x], preset=preset, **options, **engine) for x in (p, q))
        for t in range(5):
            p.grad = gradient(shape, t, GRADIENTS[size]).float()
            q.grad = p.grad.double()
            opt.step()
            exact.step()
        native = opt.matrix(opt.param_groups[0], shape) is not None
        (row,) = opt.backend_report()
        assert row.backend == (backend if native else "reference")
        assert difference(p, q) < 1e-6, shape


def test_factored_dimensions() -> None:
    def states(preset: str, *shape: int, **options: Any) -> list[tuple[int, ...]]:
        opt = danlu.Adafactor([torch.zeros(1)], preset=preset, **options)
        return [reduced_shape(shape, dims) for dims in opt.states(opt.param_groups[0], shape).values()]

    for last_two in ("huggingface", "torch"):
        assert states(last_two, 7) == [(7,)]
        assert states(last_two, 7, 1) == [(7, 1), (1, 1)]
        assert states(last_two, 2, 3, 4) == [(2, 3, 1), (2, 1, 4)]
    assert states("optax", 127, 500) == [(127, 500)]
    assert states("optax", 128, 3, 500) == [(128, 3, 1), (1, 3, 500)]
    assert states("optax", 500, 128, 3, 3) == [(500, 1, 3, 3), (1, 128, 3, 3)]
    assert states("optax", 200, 200, 200, beta1=0.9) == [(200, 200, 1), (200, 1, 200), (200, 200, 200)]
    assert states("big_vision", 32, 40, lr=1.0) == [(32, 1), (1, 40), (32, 40)]
    assert states("big_vision", 31, 40, lr=1.0, beta1=None) == [(31, 40)]
    for preset in FROM_SIZE:
        plain: dict[str, Any] = dict(lr=1.0, beta1=None)
        assert states(preset, 1, 1, **plain, **of_size(1)) == [(1, 1), (1, 1)]
        assert states(preset, 2, 3, 2, **plain, **of_size(2)) == [(2, 3, 1), (2, 1, 2)]
        assert states(preset, 2, 3, 2, **plain, **of_size(3)) == [(2, 3, 2)]
        assert states(preset, 300, 301, **plain, **of_size(301)) == [(300, 301)]


FROM_SIZE = {"optax": 128, "big_vision": 32, "bert4keras": 128}
every_sized = pytest.mark.parametrize("preset", FROM_SIZE)


def of_size(size: int) -> dict[str, Any]:
    return dict(min_dim_size_to_factor=size)


def sized(preset: str, shapes: list[tuple[int, ...]], **options: Any) -> danlu.Adafactor:
    params = [torch.nn.Parameter(0.02 * values(shape, i, wild=False)) for i, shape in enumerate(shapes)]
    return danlu.Adafactor(params, preset=preset, **{"lr": 0.1, "state_dtype": F32, **options})


def go(opt: danlu.Adafactor, *ts: int) -> list[torch.Tensor]:
    """After those steps, copies of everything."""
    params = opt.param_groups[0]["params"]
    for t in ts:
        for i, p in enumerate(params):
            p.grad = values(p.shape, 10 * t + i, wild=False).to(p.dtype)
        opt.step()
    return [t.detach().clone() for p in params for t in (p, *opt.state.get(p, {}).values())]


@every_sized
@pytest.mark.parametrize("backend", ["cpu", "cuda", "reference"])
def test_sizes_on_every_backend(preset: str, backend: str, cuda: Any) -> None:
    shapes = [(2, 3), (5, 2, 2), (1, 9), (40, 33)]
    for size in (1, 2, 32):
        opt = sized(preset, shapes, backend=backend, **of_size(size))
        exact = sized(preset, shapes, backend="reference", **of_size(size))
        for p in exact.param_groups[0]["params"]:
            p.data = p.data.double()
        go(opt, 0, 1, 2)
        go(exact, 0, 1, 2)
        for p, q in zip(opt.param_groups[0]["params"], exact.param_groups[0]["params"], strict=True):
            assert difference(p, q) < 1e-6, (size, p.shape)
            assert opt.state[p].keys() == exact.state[q].keys()
            factored = p.ndim > 1 and sorted(p.shape)[-2] >= size
            assert ("row_var" in opt.state[p]) == factored


@pytest.mark.pairs
@every_sized
@pytest.mark.parametrize("backend", ["cpu", "cuda", "reference"])
@pytest.mark.parametrize(("old", "new"), [(2, 32), (32, 2)])
@pytest.mark.parametrize("loaded", [False, True], ids=["live", "loaded"])
def test_another_size_than_that_of_the_states_is_an_error(
    preset: str, backend: str, old: int, new: int, loaded: bool, cuda: Any
) -> None:
    opt = sized(preset, [(4, 5), (6,)], backend=backend, **of_size(old))
    go(opt, 0)
    before = go(opt)
    if loaded:
        saved = copy.deepcopy(opt.state_dict())
        saved["param_groups"][0]["min_dim_size_to_factor"] = new
        with pytest.raises(ValueError, match=r"\['params'\]\[0\]: the checkpoint lacks '(row_var|variance)'"):
            opt.load_state_dict(saved)
        assert all(map(same_bits, before, go(opt)))
    opt.param_groups[0]["min_dim_size_to_factor"] = new
    for _ in range(2):
        other = r"\['params'\]\[0\]: its state has '(row_var|variance)', made with other settings"
        with pytest.raises(ValueError, match=other):
            go(opt, 1)
        with pytest.raises(ValueError, match=other):
            opt.backend_report()
        assert all(map(same_bits, before, go(opt)))
    opt.param_groups[0]["min_dim_size_to_factor"] = old
    go(opt, 1)
    opt.param_groups[0]["min_dim_size_to_factor"] = old + 1  # the same states
    go(opt, 2)
    assert opt.state[opt.param_groups[0]["params"][0]]["step"] == 3


@every_sized
def test_a_group_has_a_size_of_its_own(preset: str) -> None:
    p, q = (torch.nn.Parameter(values((4, 5), i, wild=False)) for i in range(2))
    opt = danlu.Adafactor([{"params": [p]}, {"params": [q], **of_size(2)}], preset=preset, lr=0.1)
    for x in (p, q):
        x.grad = torch.ones_like(x)
    opt.step()
    assert ("variance" in opt.state[p], "row_var" in opt.state[q]) == (True, True)
    assert [g["min_dim_size_to_factor"] for g in opt.state_dict()["param_groups"]] == [FROM_SIZE[preset], 2]
    groups = len(opt.param_groups)
    for bad in (0, -1, 2.0, True, "x", None):
        with pytest.raises(ValueError, match="min_dim_size_to_factor must be an integer of at least 1, got"):
            opt.add_param_group({"params": [torch.nn.Parameter(torch.zeros(3))], **of_size(bad)})  # type: ignore[arg-type]
    assert len(opt.param_groups) == groups


@every_sized
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_state_has_its_size_and_one_from_before_the_presets(preset: str, backend: str) -> None:
    shapes = [(3, 4), (40, 50), (130, 140)]
    for size in (FROM_SIZE[preset], 2):
        opt = sized(preset, shapes, backend=backend, **of_size(size))
        go(opt, 0, 1)
        saved = copy.deepcopy(opt.state_dict())
        if size != 2:
            del saved["param_groups"][0]["min_dim_size_to_factor"]
        new = sized(preset, shapes, backend=backend, **of_size(3))
        new.load_state_dict(saved)
        for p, q in zip(opt.param_groups[0]["params"], new.param_groups[0]["params"], strict=True):
            q.data.copy_(p.data)
        assert new.param_groups[0]["min_dim_size_to_factor"] == size
        assert all(map(same_bits, go(new, 2, 3), go(opt, 2, 3)))


def test_state_dtypes() -> None:
    p = torch.nn.Parameter(torch.zeros(40, 50, dtype=BF16))
    p.grad = torch.ones_like(p)
    opt = danlu.Adafactor([p], lr=0.1, preset="big_vision")
    opt.step()
    assert {name: s.dtype for name, s in opt.state[p].items()} == {
        "row_var": F32,
        "col_var": F32,
        "exp_avg": BF16,
        "step": F32,
    }


@pytest.mark.pairs
@pytest.mark.parametrize("library", [name for name in LIBRARIES if "big_vision" not in name])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", [F64, F32])
def test_a_librarys_state_is_taken_up(library: str, backend: str, dtype: torch.dtype) -> None:
    preset, options, make = LIBRARIES[library]
    theirs_params = [
        torch.nn.Parameter(0.02 * values(s, i, wild=False).to(dtype)) for i, s in enumerate(SHAPES)
    ]
    theirs = make(theirs_params)

    def steps(opt: Any, params: list[torch.nn.Parameter], ts: range) -> None:
        for t in ts:
            for p, shape in zip(params, SHAPES, strict=True):
                p.grad = gradient(shape, t, 1.0).to(dtype)
            opt.step()

    steps(theirs, theirs_params, range(6))
    ours_params = [torch.nn.Parameter(p.detach().clone()) for p in theirs_params]
    ours = danlu.Adafactor(ours_params, preset=preset, backend=backend)
    saved = copy.deepcopy(theirs.state_dict())  # tensors that fit would be shared
    ours.load_state_dict(saved)
    assert str(theirs.state_dict()) == str(saved)
    for name, value in options.items():
        assert ours.param_groups[0][name] == value
    steps(theirs, theirs_params, range(6, 12))
    steps(ours, ours_params, range(6, 12))
    assert all(opt_state["step"] == 12 for opt_state in ours.state.values())
    for p, q in zip(ours_params, theirs_params, strict=True):
        assert difference(p, q, past=0.02) < (EXACT if dtype == F64 else 2e-6), p.shape


def test_copies_keep_the_preset() -> None:
    p = torch.nn.Parameter(values((130, 140), 0, wild=False))
    opt = danlu.Adafactor([p], preset="optax", lr=0.1, beta1=0.9)
    p.grad = values((130, 140), 1, wild=False)
    opt.step()
    for other in (copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
        (q,) = other.param_groups[0]["params"]
        q.grad = p.grad.clone()
        other.step()
        opt_copy = copy.deepcopy(opt)
        (r,) = opt_copy.param_groups[0]["params"]
        r.grad = p.grad.clone()
        opt_copy.step()
        assert same_bits(q.detach(), r.detach())
        assert other.param_groups[0]["preset"] == "optax"


BAD: list[tuple[dict[str, Any], str]] = [
    (dict(preset="t5x"), "preset must be one of"),
    (dict(preset="torch", beta1=0.9), "beta1 is no option of the preset 'torch'"),
    (dict(preset="torch", relative_step=True), "relative_step is no option of the preset 'torch'"),
    (dict(preset="optax", warmup_init=True), "warmup_init is no option of the preset 'optax'"),
    (dict(preset="big_vision", lr=1.0, scale_parameter=True), "scale_parameter is no option"),
    (dict(preset="bert4keras", weight_decay=0.1), "weight_decay is no option of the preset 'bert4keras'"),
    (dict(preset="big_vision"), "lr must be given in the preset 'big_vision'"),
    (dict(preset="torch", lr=None), "lr must be given in the preset 'torch'"),
    (dict(relative_step=False), "lr must be given in the preset 'huggingface' without relative_step"),
    (dict(lr=1.0, relative_step=True), "lr must be None with relative_step=True"),
    (dict(lr=1.0, warmup_init=True), "warmup_init=True needs relative_step=True"),
    (dict(lr=-1.0), "lr must be finite and at least 0, got -1"),
    (dict(eps=1e-30), "eps must be two numbers"),
    (dict(eps=(None, 1e-3)), r"eps\[0\] must be a number"),
    (dict(eps=(1e-30, -1.0)), r"eps\[1\] must be finite and at least 0"),
    (dict(clip_threshold=0.0), "clip_threshold must be greater than 0"),
    (dict(clip_threshold=math.nan), "clip_threshold must be finite"),
    (dict(decay_rate=0.8), "decay_rate must be finite and at most 0, got 0.8"),
    (dict(min_dim_size_to_factor=2), "min_dim_size_to_factor is no option of the preset 'huggingface'"),
    (dict(preset="torch", min_dim_size_to_factor=2), "min_dim_size_to_factor is no option"),
    (
        dict(preset="optax", min_dim_size_to_factor=0),
        "min_dim_size_to_factor must be an integer of at least 1",
    ),
    (dict(beta1=1.0), r"beta1 must be in \[0, 1\)"),
    (dict(beta2_cap=1.0), r"beta2_cap must be in \[0, 1\)"),
    (dict(weight_decay=-0.1), "weight_decay must be finite and at least 0"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=lambda x: str(x))
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        danlu.Adafactor([torch.zeros(3)], **options)


def test_a_group_may_not_leave_the_preset() -> None:
    opt = danlu.Adafactor([torch.nn.Parameter(torch.zeros(3))], preset="torch")
    for group, message in (
        ({"beta1": 0.9}, "beta1 is no option of the preset 'torch'"),
        ({"preset": "optax"}, "preset must be 'torch' in every group, got 'optax'"),
        ({"lr": None}, "lr must be given"),
    ):
        with pytest.raises(ValueError, match=message):
            opt.add_param_group({"params": [torch.nn.Parameter(torch.zeros(3))], **group})
    assert len(opt.param_groups) == 1
    opt.add_param_group({"params": [torch.nn.Parameter(torch.zeros(3))], "clip_threshold": None, "lr": 0.5})


def test_a_default_of_huggingface_gives_way_to_an_lr() -> None:
    assert not danlu.Adafactor([torch.zeros(3)], lr=0.1).param_groups[0]["relative_step"]
    assert danlu.Adafactor([torch.zeros(3)]).param_groups[0]["relative_step"]
