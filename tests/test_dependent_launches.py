"""Programmatic dependent launch: which passes start while the one before ends, and that all wait."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import danlu
from cases import EVERY_REDUCING, REDUCING, Case, values
from danlu import capture
from danlu.backends import cuda as backend
from emulated import Emulated
from training import all_same, copies, give_gradients

MATRICES = [(70, 40), (3, 9, 24), (600, 5), (2, 9000)]
SHAPES = [*MATRICES, (33,)]
ONE_PASS = ("tiger-rows", "amos-full")


@pytest.fixture(autouse=True)
def _no_capability_is_kept() -> Iterator[None]:
    backend._capability.cache_clear()
    yield
    backend._capability.cache_clear()


def stepped(case: Case, cuda: Emulated, *, overlaps: bool) -> list[torch.Tensor]:
    machine = cuda.native.machine()
    machine.overlaps = overlaps
    shapes = MATRICES if case.id.startswith("amos-columns") else SHAPES
    params = [torch.nn.Parameter(values(shape, i, wild=False)) for i, shape in enumerate(shapes)]
    opt = case.make(params, backend="cuda")
    give_gradients(params, 1)
    opt.step()
    cuda.native.finish()
    machine.overlaps = False
    return copies(opt)


@pytest.mark.usefixtures("poisoned_scratch")
@pytest.mark.parametrize("case", EVERY_REDUCING, ids=lambda c: c.id)
def test_what_an_overlapped_pass_reads(case: Case, cuda: Emulated) -> None:
    """Each starts before the one in front of it, up to its wait, which is all that there is before it."""
    results = [stepped(case, cuda, overlaps=overlaps) for overlaps in (False, True)]
    assert all_same(*results)
    assert any(one.early for one in cuda.native.machine().launches) == (case.id not in ONE_PASS)


def starts_early(cuda: Emulated, opt: danlu.FusedOptimizer, params: list[torch.nn.Parameter]) -> list[bool]:
    give_gradients(params, 1)
    before = len(cuda.native.machine().launches)
    opt.step()
    return [launch.early for launch in cuda.native.machine().launches[before:]]


def test_which_start_early(cuda: Emulated, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the first of each list; none on older devices, in a capture, or where it is turned off."""
    params = [torch.nn.Parameter(values(shape, i, wild=False)) for i, shape in enumerate(SHAPES)]

    def early(**options: object) -> list[bool]:
        return starts_early(cuda, danlu.Adafactor(params, lr=1e-3, backend="cuda", **options), params)

    six, three = [False, *[True] * 5], [False, *[True] * 2]
    assert early() == six + three
    assert early(max_grad_norm=1.0) == [False, False, *six, *three]
    with monkeypatch.context() as patch:
        patch.setattr(backend, "group_bytes", lambda device: 4.0 * 3000)
        in_groups = early()
    assert len(in_groups) > 20
    assert in_groups.count(False) == 2  # groups of one list follow one another
    none = [False] * 9
    with monkeypatch.context() as patch:
        patch.setattr(cuda, "dependent_launches", False)
        assert early() == none
    with monkeypatch.context() as patch:
        patch.setattr(capture, "is_capturing", lambda device: True)
        assert early(capturable=True) == none
    assert early(capturable=True) == six + three
    for capability, wanted in ((80, none), (89, none), (100, six + three)):
        cuda.native.machine().capability = capability
        backend._capability.cache_clear()
        assert early() == wanted


def test_element_wise_launches_never_start_early(cuda: Emulated) -> None:
    params = [torch.nn.Parameter(values((70,), i, wild=False)) for i in range(3)]
    opt = danlu.AdamW(params, backend="cuda", max_grad_norm=1.0)
    assert starts_early(cuda, opt, params) == [False] * 3


def test_blocks_with_nothing_to_do_wait(cuda: Emulated) -> None:
    """Without a gradient, or where found_inf cancels the step; the emulator raises unless threads do."""
    params = [torch.nn.Parameter(values(shape, i, wild=False)) for i, shape in enumerate(SHAPES)]
    for case in REDUCING:
        opt = case.make(params, backend="cuda", capturable=True)
        give_gradients(params, 1)
        params[0].grad = None
        opt.step()
        opt.found_inf = torch.ones(1)  # type: ignore[attr-defined]
        opt.step()


def test_the_emulator_shows_a_read_before_the_wait(cuda: Emulated) -> None:
    cuda.native.machine().overlaps = True
    assert cuda.native.overlapping() == (0.0, 1.0)
    cuda.native.machine().overlaps = False
    assert cuda.native.overlapping() == (1.0, 1.0)
    with pytest.raises(RuntimeError, match="a thread of a launch that may start early has not waited"):
        cuda.native.impatient()
    assert cuda.native.overlapping() == (1.0, 1.0)
