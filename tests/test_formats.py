"""A format of one's own, on every backend: numbers in two arrays, and numbers that depend on their place.

What is added is in toy_formats.py, formats/ and interpreted/toy_kernels.py: no rule and no engine knows.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from typing import Any

import pytest
import torch

import danlu
import danlu.backends.cpu
from cases import BACKENDS as HERE
from cases import INTERPRETED, set_gradient, values
from danlu import formats
from danlu.backends import BACKENDS
from danlu.formats import FORMATS, Format
from danlu.testing import same_bits
from emulated import AVAILABLE
from layouts import LAYOUTS, Layout, offset
from lazy_runs import coo
from toy_formats import HALVES, TOYS, Halved, Mixed, modules, triton_formats

SETTINGS: dict[str, Any] = dict(lr=2e-3, betas=(0.8, 0.95), weight_decay=0.1)
KEYS = ("exp_avg", "exp_avg_sq")
CLASSES = [Halved, Mixed]
CHUNK = 16384
# that kernels treat apart; few of them under the interpreter
SIZES = (7, CHUNK + 1) if INTERPRETED else (1, 7, 255, 1025, CHUNK - 1, CHUNK + 1)


@pytest.fixture(params=HERE)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With kernels that have the formats."""
    if not AVAILABLE:
        assert not os.environ.get("CI"), "CI runs on x86-64"
        pytest.skip("the emulator switches stacks in x86-64 assembly")
    cpu, cuda = modules()
    for kept in TOYS:
        monkeypatch.setitem(FORMATS, kept.name, kept)
    monkeypatch.setattr(danlu, "_cpu", cpu)
    monkeypatch.setattr(danlu.backends.cpu, "_cpu", cpu)
    monkeypatch.setitem(BACKENDS, "cuda", cuda)
    if INTERPRETED:
        from danlu.triton_kernels.formats import FORMATS as OF_KERNELS

        for name, kept in triton_formats().items():
            monkeypatch.setitem(OF_KERNELS, name, kept)
    return str(request.param)


def loaded(kept: Format, state: dict[str, Any], key: str, p: torch.Tensor | None = None) -> torch.Tensor:
    """The numbers of a state, or of a parameter."""
    keys = kept.keys(key) if p is None else kept.keys_of_parameter()
    tensors = [*([] if p is None else [p.detach()]), *(state[k] for k in keys)]
    return kept.load(tensors, torch.arange(tensors[0].numel()).view(tensors[0].shape))


def start(layout: Layout, seed: int) -> torch.Tensor:
    """Numbers that a parameter in halves has to begin with, too."""
    return layout.param(values(layout.shape, seed).to(torch.bfloat16))


def parameters(opt: danlu.FusedOptimizer) -> list[torch.Tensor]:
    return list(opt.param_groups[0]["params"])


def made(shapes: Sequence[tuple[int, ...]], cls: type[danlu.AdamW], backend: str) -> danlu.AdamW:
    """Over contiguous parameters of ordinary numbers."""
    kind = torch.bfloat16 if cls is Halved else torch.float32
    begun = [values(shape, i, wild=False).bfloat16().to(kind) for i, shape in enumerate(shapes)]
    return cls([torch.nn.Parameter(x) for x in begun], backend=backend, **SETTINGS)


def copied(opt: danlu.AdamW, cls: type[danlu.AdamW], backend: str) -> danlu.AdamW:
    """Another one over copies of the parameters, without state."""
    return cls([torch.nn.Parameter(p.detach().clone()) for p in parameters(opt)], backend=backend, **SETTINGS)


def grown(layouts: list[Layout], cls: type[danlu.AdamW], backend: str, steps: int = 4) -> danlu.AdamW:
    """After some steps, of which not every parameter takes each."""
    kind = torch.bfloat16 if cls is Halved else torch.float32
    params = [torch.nn.Parameter(start(layout, i).to(kind)) for i, layout in enumerate(layouts)]
    opt = cls(params, backend=backend, **SETTINGS)
    for t in range(steps):
        for i, (layout, p) in enumerate(zip(layouts, params, strict=True)):
            p.grad = None
            if (t + i) % 4 != 3:
                set_gradient(p, layout.grad(values(layout.shape, 1000 * (t + 1) + i)))
        opt.step()
    return opt


def assert_same(got: danlu.AdamW, want: danlu.AdamW) -> None:
    """Of a toy's numbers and plain ones."""
    pairs = zip(parameters(got), parameters(want), strict=True)
    for i, (p, plain) in enumerate(pairs):
        own = got.param_format(p)
        assert same_bits(loaded(own, got.state[p], "", p), plain.detach()), i
        for key in KEYS:
            kept = got.state_format(key, p)
            assert same_bits(loaded(kept, got.state[p], key), want.state[plain][key]), (i, key)


@pytest.mark.parametrize("cls", CLASSES)
def test_same_bits_as_fp32(cls: type[danlu.AdamW], backend: str) -> None:
    """Over every layout: tails, chunks, orders of strides, alignments."""
    slow = {"one-chunk", "several-chunks"} if INTERPRETED else set()
    taken = [
        layout for layout in LAYOUTS if layout.id not in slow and (layout.native or backend == "reference")
    ]
    got = grown(taken, cls, backend)
    assert_same(got, grown(taken, danlu.AdamW, "reference"))
    for layout, row in zip(taken, got.backend_report(), strict=True):
        p = start(layout, 0)
        if row.dtypes[1] != "float32":  # there was no gradient
            continue
        by_place = cls is Mixed and not p.is_contiguous()  # strides put its elements at other places
        assert row.backend == ("reference" if by_place else backend), (layout.id, row.reason)
        if by_place and backend != "reference":
            assert "needs the places of elements" in row.reason


@pytest.mark.parametrize("cls", CLASSES)
def test_every_alignment_and_tail(cls: type[danlu.AdamW], backend: str) -> None:
    """All arrays misaligned, or one alone, around lengths that kernels treat apart."""
    arrays = 6 if cls is Halved else 4
    moved = [[int(j in (i, i + 1)) for j in range(arrays)] for i in range(arrays)] + [[0] * arrays]
    layouts = [Layout("", (size,)) for size in SIZES for _ in moved]
    got, want = grown(layouts, cls, backend, steps=2), grown(layouts, danlu.AdamW, "reference", steps=2)
    for i, p in enumerate(parameters(got)):
        *of_states, of_p = moved[i % len(moved)]
        p.data = offset(of_p)(p.data)
        keys = [key for key in got.state[p] if key != "step"]
        for key, shift in zip(keys, of_states, strict=True):
            got.state[p][key] = offset(shift)(got.state[p][key])
    for opt in (got, want):
        for i, p in enumerate(parameters(opt)):
            set_gradient(p, values(p.shape, 77 + i))
        opt.step()
    assert_same(got, want)


@pytest.mark.parametrize("mode", ["rows", "params"])
@pytest.mark.parametrize("cls", CLASSES)
def test_rows_know_their_places(cls: type[danlu.AdamW], mode: str, backend: str) -> None:
    """Kernels take runs of rows, as tensors of their own."""
    stepped = [made([(40, 33)], cls, backend), made([(40, 33)], danlu.AdamW, "reference")]
    for inner in stepped:
        opt = danlu.Lazy(inner, mode=mode)
        (p,) = parameters(inner)
        for t, rows in enumerate(([3, 4, 5, 39, 0], [17, 3])):
            listed = values((len(rows), 33), 5 + t, wild=False)
            set_gradient(p, coo(rows, listed, p.shape))
            opt.step()
    assert_same(*stepped)


@pytest.mark.parametrize("cls", CLASSES)
def test_rules_that_sum(cls: type[danlu.AdamW], backend: str) -> None:
    """The same kernels, passes and order of sums as for fp32."""
    shapes = [(40, 33), (CHUNK + 9,), (3,)]
    stepped = [made(shapes, of, backend) for of in (cls, danlu.AdamW)]
    for inner in stepped:
        opt = danlu.LayerAdaptation(inner)
        for t in range(3):
            for i, p in enumerate(parameters(inner)):
                set_gradient(p, values(p.shape, 10 * t + i, wild=False))
            opt.step()
    assert_same(*stepped)


@pytest.mark.parametrize("cls", CLASSES)
def test_a_state_dict_has_all_tensors(cls: type[danlu.AdamW], backend: str) -> None:
    layouts = [Layout("", (65,)), Layout("", (4, 9))]
    first = grown(layouts, cls, backend)
    saved = copy.deepcopy(first.state_dict())
    keys = {"exp_avg", "exp_avg_low", "exp_avg_sq", "exp_avg_sq_low", "low", "step"}
    assert saved["state"][0].keys() == (keys if cls is Halved else keys - {"exp_avg_low", "low"})
    second = copied(first, cls, backend)
    second.load_state_dict(saved)
    for opt in (first, second):
        for p in parameters(opt):
            set_gradient(p, torch.ones(p.shape))
        opt.step()
    for p, q in zip(parameters(first), parameters(second), strict=True):
        assert same_bits(p.detach(), q.detach())
        assert all(same_bits(first.state[p][key], second.state[q][key]) for key in first.state[p])


@pytest.mark.parametrize("cls", CLASSES)
def test_states_of_other_formats_are_converted(cls: type[danlu.AdamW], backend: str) -> None:
    layouts = [Layout("", (65,)), Layout("", (4, 9))]
    plain, toy = (grown(layouts, of, backend) for of in (danlu.AdamW, cls))
    for source, target in ((plain, toy), (toy, plain)):
        found = copied(target, type(target), backend)
        found.load_state_dict(copy.deepcopy(source.state_dict()))
        for p, q in zip(parameters(found), parameters(source), strict=True):
            for key in KEYS:
                kept, of = found.state_format(key, p), source.state_format(key, q)
                assert same_bits(loaded(kept, found.state[p], key), loaded(of, source.state[q], key))
            assert ("exp_avg_sq_low" in found.state[p]) == (target is toy)


def test_what_does_not_fit_is_refused(backend: str) -> None:
    opt = grown([Layout("", (65,))], Halved, backend)
    (p,) = parameters(opt)
    saved = copy.deepcopy(opt.state_dict())
    wrong = copy.deepcopy(saved)
    wrong["state"][0]["exp_avg_low"] = torch.zeros(64, dtype=torch.int16)
    with pytest.raises(ValueError, match=r"params'\]\[0\]: state 'exp_avg_low' has shape \(64,\)"):
        opt.load_state_dict(wrong)
    wrong = copy.deepcopy(saved)
    wrong["state"][0]["low"] = torch.zeros(65, dtype=torch.int32)
    with pytest.raises(TypeError, match=r"state 'low' has dtype torch\.int32, its format needs torch\.int16"):
        opt.load_state_dict(wrong)
    set_gradient(p, torch.ones(65))
    before = p.detach().clone()
    low = opt.state[p].pop("exp_avg_low")
    with pytest.raises(ValueError, match="its state lacks 'exp_avg_low', without which 'exp_avg'"):
        opt.step()
    opt.state[p]["exp_avg_low"] = low.int()
    with pytest.raises(TypeError, match=r"state 'exp_avg_low' has dtype torch\.int32"):
        opt.step()
    assert same_bits(before, p.detach())
    opt.state[p]["exp_avg_low"] = low
    opt.step()
    assert not same_bits(before, p.detach())


def test_kernels_have_the_table(backend: str) -> None:
    """Python's formats, C++'s and Triton's are the same."""
    want = {
        name: (tuple(str(array.dtype).removeprefix("torch.") for array in kept.arrays), kept.indexed)
        for name, kept in FORMATS.items()
    }
    assert modules()[0].formats == want
    if INTERPRETED:
        from danlu.triton_kernels.formats import FORMATS as OF_KERNELS

        names = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
        found = {
            name: (tuple(names.get(str(t), str(t)) for t in kept.types), kept.indexed)
            for name, kept in OF_KERNELS.items()
        }
        assert found == want


@pytest.mark.skipif(INTERPRETED, reason="the modules that danlu ships")
def test_without_kernels_the_reference_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    for kept in TOYS:
        monkeypatch.setitem(FORMATS, kept.name, kept)
    got = grown([Layout("", (65,))], Halved, "auto")
    (row,) = got.backend_report()
    assert row.backend == "reference"
    assert "no native kernel for halves/" in row.reason
    assert_same(got, grown([Layout("", (65,))], danlu.AdamW, "reference"))
    assert formats.named("halves") is HALVES
