"""Bad input raises an error that names the parameter or the setting, and changes nothing."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import danlu
from cases import CASES, Case, values
from danlu.backends import BACKENDS
from danlu.backends.cuda import Cuda
from danlu.testing import same_bits

NAME = "param_groups[1]['params'][1]"


def bits(opt: danlu.FusedOptimizer) -> list[dict[str, torch.Tensor]]:
    params = [p for g in opt.param_groups for p in g["params"]]
    return [{"param": p.detach().clone(), **copy.deepcopy(dict(opt.state.get(p, {})))} for p in params]


def assert_unchanged(opt: danlu.FusedOptimizer, before: list[dict[str, torch.Tensor]]) -> None:
    for old, new in zip(before, bits(opt), strict=True):
        assert old.keys() == new.keys()
        for key in old:
            if not isinstance(old[key], torch.Tensor) or old[key].is_meta or old[key].is_sparse:
                continue
            if old[key].is_floating_point() and not old[key].is_quantized:
                assert same_bits(old[key], new[key]), key


def with_gradient(shape: tuple[int, ...], seed: int) -> torch.nn.Parameter:
    p = torch.nn.Parameter(values(shape, seed, wild=False))
    p.grad = values(shape, seed + 100, wild=False)
    return p


def sparse_gradient(p: torch.nn.Parameter) -> None:
    p.grad = torch.sparse_coo_tensor([[0]], torch.ones(1, 3), p.shape, check_invariants=True)


def swap_data(data: torch.Tensor) -> Callable[[torch.nn.Parameter], None]:
    def damage(p: torch.nn.Parameter) -> None:
        p.data = data

    return damage


def swap_gradient_data(data: torch.Tensor) -> Callable[[torch.nn.Parameter], None]:
    def damage(p: torch.nn.Parameter) -> None:
        assert p.grad is not None
        p.grad.data = data

    return damage


def expand(p: torch.nn.Parameter) -> None:
    p.data = torch.zeros(1, 3).expand(4, 3)


def replace(make: Callable[[], torch.Tensor]) -> Callable[[torch.nn.Parameter], torch.Tensor]:
    """For what torch does not let a living parameter become: another tensor takes its place in the group."""

    def damage(p: torch.nn.Parameter) -> torch.Tensor:
        other = make()
        other.grad = make()
        return other

    return damage


def overlap(p: torch.nn.Parameter) -> None:
    p.data = torch.zeros(12).as_strided((4, 3), (1, 1))


Damage = Callable[[torch.nn.Parameter], torch.Tensor | None]
DAMAGE: dict[str, tuple[Damage, type[Exception], str]] = {
    "sparse gradient": (sparse_gradient, TypeError, "sparse.*danlu.Lazy"),
    "gradient of another shape": (swap_gradient_data(torch.zeros(3, 4)), ValueError, r"\(3, 4\).*\(4, 3\)"),
    "gradient of another size": (swap_gradient_data(torch.zeros(2)), ValueError, r"\(2,\)"),
    "gradient with fewer rows": (swap_gradient_data(torch.zeros(3, 3)), ValueError, r"\(3, 3\).*\(4, 3\)"),
    "parameter with fewer rows": (swap_data(torch.zeros(3, 3)), ValueError, "shape"),
    "parameter of another shape": (swap_data(torch.zeros(5)), ValueError, "shape"),
    "expanded parameter": (expand, ValueError, "share memory"),
    "overlapping parameter": (overlap, ValueError, "share memory"),
    "complex parameter": (swap_data(torch.zeros(4, 3, dtype=torch.complex64)), TypeError, "complex64"),
    "integer parameter": (replace(lambda: torch.zeros(4, 3, dtype=torch.int32)), TypeError, "int32"),
    "integer gradient": (swap_gradient_data(torch.zeros(4, 3, dtype=torch.int64)), TypeError, "int64"),
    "complex gradient": (swap_gradient_data(torch.zeros(4, 3, dtype=torch.complex64)), TypeError, "complex"),
    "meta parameter": (replace(lambda: torch.zeros(4, 3, device="meta")), ValueError, "meta"),
    "quantized parameter": (
        replace(lambda: torch.quantize_per_tensor(torch.zeros(4, 3), 0.1, 0, torch.qint8)),
        TypeError,
        "quantized",
    ),
}


@pytest.mark.pairs
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
@pytest.mark.parametrize("started", [False, True], ids=["first step", "later step"])
@pytest.mark.parametrize("what", DAMAGE)
def test_a_bad_tensor_is_named_and_nothing_changes(what: str, started: bool, backend: str) -> None:
    good, bad = with_gradient((4, 3), 0), with_gradient((4, 3), 1)
    opt = danlu.AdamW([{"params": [good]}, {"params": [with_gradient((5,), 2), bad]}], backend=backend)
    if started:
        opt.step()
    damage, error, message = DAMAGE[what]
    group = opt.param_groups[1]["params"]
    replacement = damage(bad)
    if replacement is not None:
        group[1] = replacement
    before = bits(opt)
    with pytest.raises(error, match=f"{re.escape(NAME)}.*{message}"):
        opt.step()
    assert_unchanged(opt, before)
    group[1] = with_gradient((4, 3), 1)
    opt.step()  # and it goes on
    assert opt.state[good]["step"] == 1 + started


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("exp_avg", torch.zeros(3, 4), r"state 'exp_avg' has shape \(3, 4\)"),
        ("exp_avg_sq", torch.zeros(4, 3, dtype=torch.int32), "state 'exp_avg_sq' has dtype torch.int32"),
        ("exp_avg", torch.zeros(1, 3).expand(4, 3), "state 'exp_avg' share memory"),
        ("exp_avg", torch.zeros(4, 3, device="meta"), "state 'exp_avg' has .* on meta, the .* on cpu"),
        ("exp_avg", 1.0, "state 'exp_avg' must be a tensor"),
        ("step", 3, "state 'step' must be a float32 tensor"),
        ("step", torch.zeros(2), "state 'step' must be a float32 tensor"),
        ("step", torch.tensor(3), "state 'step' must be a float32 tensor"),
    ],
)
def test_a_bad_state_is_named_and_nothing_changes(key: str, value: Any, message: str, backend: str) -> None:
    good, bad = with_gradient((4, 3), 0), with_gradient((4, 3), 1)
    opt = danlu.AdamW([good, bad], backend=backend)
    opt.step()
    opt.state[bad][key] = value
    before = bits(opt)
    with pytest.raises((TypeError, ValueError), match=rf"params'\]\[1\].*{message}"):
        opt.step()
    assert_unchanged(opt, before)


def test_a_given_name_is_used() -> None:
    linear = torch.nn.Linear(3, 2)
    opt = danlu.Lion(linear.named_parameters())
    linear.weight.grad = torch.ones(2, 3)
    linear.bias.grad = torch.sparse_coo_tensor([[0]], torch.ones(1), (2,), check_invariants=True)
    with pytest.raises(TypeError, match=r"^bias: the gradient is sparse"):
        opt.step()


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("lr", -1e-3, r"Invalid learning rate: lr must be finite and at least 0, got -0\.001"),
        ("lr", float("nan"), "lr must be finite"),
        ("lr", float("inf"), "lr must be finite"),
        ("lr", "fast", "lr must be a number, got 'fast'"),
        (
            "lr",
            torch.ones(2),
            "Tensor lr must be 1-element: lr must be a number or a real tensor of one element",
        ),
        (
            "lr",
            torch.ones(1, dtype=torch.complex64),
            "lr must be .* a real .* of one element, got torch.complex64",
        ),
        ("lr", torch.tensor(-1.0), "lr must be finite and at least 0"),
        ("weight_decay", -0.1, r"weight_decay must be finite and at least 0, got -0\.1"),
        ("betas", (1.2, 0.9), r"betas\[0\] must be in \[0, 1\), got 1\.2"),
        ("betas", (0.9, 1.0), r"betas\[1\] must be in [\[(]0, 1\), got 1\.0"),
        ("betas", (0.9, -0.1), r"betas\[1\] must be in"),
        ("betas", 0.9, r"betas must be two numbers, got 0\.9"),
        ("betas", (0.9, 0.99, 0.999), "betas must be two numbers"),
        ("betas", (0.9, "b"), r"betas\[1\] must be a number"),
        ("beta", 1.0, r"beta must be in \[0, 1\), got 1\.0"),
        ("accumulation_steps", 0, "accumulation_steps must be an integer of at least 1, got 0"),
        ("accumulation_steps", 1.5, "accumulation_steps must be an integer"),
        ("accumulation_steps", True, "accumulation_steps must be an integer"),
        ("eps", -1e-8, "eps must be finite and at least 0"),
        ("eps_mode", "outside", "eps_mode must be one of 'official', 'hat', 'inside', got 'outside'"),
        ("amsgrad", True, "amsgrad is not offered"),
    ],
)
def test_hyper_parameters_out_of_range(case: Case, setting: str, value: Any, message: str) -> None:
    p = with_gradient((3,), 0)
    opt = case.make([p])
    if setting not in opt.defaults:
        with pytest.raises(TypeError, match=setting):
            case.make([p], **{setting: value})
        return
    with pytest.raises(ValueError, match=message):
        case.make([p], **{setting: value})
    with pytest.raises(ValueError, match=message):
        case.make([{"params": [p], setting: value}])
    groups = len(opt.param_groups)
    with pytest.raises(ValueError, match=message):
        opt.add_param_group({"params": [with_gradient((2,), 1)], setting: value})
    assert len(opt.param_groups) == groups
    opt.step()


def test_adax_needs_some_memory() -> None:
    with pytest.raises(ValueError, match=r"betas\[1\] must be in \(0, 1\), got 0"):
        danlu.AdaX([with_gradient((3,), 0)], betas=(0.9, 0))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(backend="gpu"), ValueError, "backend must be one of 'auto', 'reference', 'cpu', 'cuda'"),
        (dict(backend="triton"), RuntimeError, "backend='triton' is not available: there is no GPU"),
        (dict(backend="cpu", fused=False), ValueError, "fused=False asks for the reference"),
        (dict(backend="reference", fused=True), ValueError, "fused=True asks for a native backend"),
        (dict(state_dtype=torch.float64), ValueError, "state_dtype must be one of torch.float32"),
        (dict(state_dtype="bf16"), ValueError, "state_dtype must be one of"),
        (dict(max_grad_norm=-1.0), ValueError, "max_grad_norm must be finite and at least 0"),
        (dict(max_grad_norm=0.0), ValueError, "max_grad_norm must be greater than 0"),
        (dict(differentiable=True), ValueError, "differentiable must be False"),
        (dict(fussed=True), TypeError, "fussed"),
    ],
)
def test_engine_options_out_of_range(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        danlu.Lion([with_gradient((3,), 0)], **options)


def test_a_missing_cuda_module_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS, "cuda", Cuda(None, "danlu._cuda cannot be imported (just so)"))
    with pytest.raises(RuntimeError, match=r"backend='cuda' is not available: .*just so"):
        danlu.Lion([with_gradient((3,), 0)], backend="cuda")


HIDE = """
import importlib.util, sys
class Finder:
    def find_spec(name, path=None, target=None):
        if name == "danlu._cuda":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        if name == "danlu._cpu":
            return importlib.util.spec_from_file_location(name, sys.argv[1])
sys.meta_path.insert(0, Finder)
from danlu.backends import BACKENDS
print(BACKENDS["cuda"].unavailable(), BACKENDS["cpu"].unavailable(), sep="\\n")
"""


def test_it_is_said_whether_a_native_module_is_missing_or_broken(tmp_path: Path) -> None:
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"no library")
    run = subprocess.run([sys.executable, "-c", HIDE, broken], capture_output=True, text=True, check=True)
    cuda, cpu = run.stdout.splitlines()
    assert cuda == "danlu._cuda was not built (it is where nvcc is, see README)"
    assert cpu.startswith(f"danlu._cpu cannot be imported ({broken}: ")


def test_a_missing_native_module_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    from danlu.backends import cpu

    monkeypatch.setattr(cpu, "_MISSING", "danlu._cpu cannot be imported (just so)")
    with pytest.raises(RuntimeError, match=r"backend='cpu' is not available: .*just so"):
        danlu.Lion([with_gradient((3,), 0)], backend="cpu")
    with pytest.raises(RuntimeError, match="fused=True, but no native backend is available"):
        danlu.Lion([with_gradient((3,), 0)], fused=True)
    opt = danlu.Lion([with_gradient((3,), 0)])
    opt.step()
    (row,) = opt.backend_report()
    assert row.backend == "reference"
    assert "just so" in row.reason
