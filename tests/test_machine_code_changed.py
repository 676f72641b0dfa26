"""Code that a compiler got wrong is seen: one changed instruction gives other results, or a fault."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

import pytest

from cases import CASES, STORAGES, Case, Storage
from layouts import Layout, contiguous
from machine_code import ptx
from machine_code.executed import Executor
from machine_code.memory import Fault
from reductions import CASE, DOUBLE, far
from runs import Result, assert_same, run
from test_machine_code_ptx import offset

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS = 2
LAYOUTS = [
    Layout("turns", (3101,)),
    Layout("matrix", (70, 63)),
    Layout("apart", (37, 41), contiguous, offset(1)),
]
LION, ADAMW, LAMB, FACTORED = "lion", "adamw", "lamb", "adafactor"
BY_ID = {**CASE, **{case.id: case for case in CASES}}
F32, BF16 = STORAGES[0], STORAGES[3]
FOR_EVER = 20_000  # instructions


@dataclass(frozen=True)
class Change:
    """`pattern` and what replaces it, nothing for the instruction itself, in the `nth` that has it."""

    backend: str
    case: str
    storage: Storage
    kernel: str
    pattern: str
    instead: str | None
    nth: int = 0

    @property
    def id(self) -> str:
        short = re.sub(r"[^\w.]+", "-", f"{self.pattern}-{self.instead or 'dropped'}")
        return f"{self.backend}-{self.case}-{self.storage.id}-{self.kernel}-{short}-{self.nth}"

    def __call__(self, kernel: ptx.Kernel) -> ptx.Kernel:
        if self.kernel not in kernel.name:
            return kernel
        at = [i for i, one in enumerate(kernel.code) if re.search(self.pattern, str(one))][self.nth]
        if self.instead is None:
            return kernel.changed(at, None)
        return kernel.changed(at, ptx.instruction(re.sub(self.pattern, self.instead, str(kernel.code[at]))))


def changes() -> list[Change]:
    cuda, triton = "cuda", "triton"
    step = "apply_kernel"
    return [
        # arithmetic
        Change(cuda, ADAMW, F32, step, r"add\.rn\.f32", "sub.rn.f32"),
        Change(cuda, ADAMW, F32, step, r"mul\.rn\.f32", "add.rn.f32", 2),
        Change(cuda, ADAMW, F32, step, r"div\.rn\.f32", "mul.rn.f32"),
        Change(cuda, ADAMW, F32, step, r"sqrt\.rn\.f32", "mov.f32"),
        Change(cuda, ADAMW, F32, step, r"sub\.rn\.f32 (\S+), (\S+), (\S+);", r"sub.rn.f32 \1, \3, \2;", -1),
        Change(cuda, LION, F32, step, r"selp\.f32 (\S+), (\S+), (\S+), ", r"selp.f32 \1, \3, \2, "),
        Change(triton, LION, F32, step, r"setp\.gt\.f32", "setp.lt.f32"),
        Change(cuda, LION, F32, step, r"setp\.num\.f32", "setp.nan.f32", 2),
        Change(cuda, LION, F32, step, r"setp\.neu\.f32", "setp.num.f32", 3),
        Change(triton, ADAMW, F32, step, r"add\.rn\.f32", "sub.rn.f32"),
        Change(triton, ADAMW, F32, step, r"div\.rn\.f32", "mul.rn.f32", -1),
        Change(triton, LION, F32, step, r"selp\.f32 (\S+), (\S+), (\S+), ", r"selp.f32 \1, \3, \2, "),
        # which elements
        Change(cuda, ADAMW, F32, step, r"shl\.b64 (\S+), (\S+), 2", r"shl.b64 \1, \2, 3", -1),
        Change(cuda, ADAMW, F32, step, r"and\.b64 (\S+), (\S+), 15", r"and.b64 \1, \2, 3"),
        Change(
            cuda, ADAMW, F32, step, r"mad\.lo\.s32 (\S+), (\S+), (\S+), (\S+);", r"mad.lo.s32 \1, \2, \3, 0;"
        ),
        Change(cuda, ADAMW, F32, step, r"setp\.ge\.s32", "setp.gt.s32", -1),
        Change(cuda, ADAMW, F32, step, r"add\.s32 (\S+), (\S+), 1024", r"add.s32 \1, \2, 1020", -1),
        Change(cuda, ADAMW, F32, step, r"bra ", None, -1),
        Change(triton, ADAMW, F32, step, r"and\.b64 (\S+), (\S+), 15", r"and.b64 \1, \2, 3"),
        Change(triton, ADAMW, F32, step, r"setp\.lt\.s32", "setp.le.s32", -2),
        # memory
        Change(cuda, ADAMW, F32, step, r"st\.global\.f32", None, -1),
        Change(cuda, ADAMW, F32, step, r"st\.global\.v4\.f32", None, 0),
        Change(
            cuda, ADAMW, F32, step, r"ld\.global\.v4\.f32 (.*)\[(%rd\d+)\]", r"ld.global.v4.f32 \1[\2+16]"
        ),
        Change(cuda, ADAMW, F32, step, r"ld\.global\.v4\.f32 (.*)\[(%rd\d+)\]", r"ld.global.v4.f32 \1[\2+4]"),
        Change(cuda, ADAMW, F32, step, r"st\.global\.f32 \[(%rd\d+)\]", r"st.global.f32 [\1+4]", -1),
        Change(
            cuda, ADAMW, F32, step, r"ld\.param\.f32 (\S+), \[(%rd\d+)\+(\d+)\]", r"ld.param.f32 \1, [\2]", 3
        ),
        Change(triton, ADAMW, F32, step, r"st\.global\.b32", None, -1),
        Change(triton, ADAMW, F32, step, r"st\.global\.v4\.b32", None),
        Change(triton, ADAMW, F32, step, r"\+ 0 \]", r"+ 4 ]", -1),
        # storage formats
        Change(cuda, ADAMW, BF16, step, r"v4\.u16 (\S+), \{(\S+), (\S+),", r"v4.u16 \1, {\3, \2,"),
        Change(cuda, ADAMW, BF16, step, r"shl\.b32 (\S+), (\S+), 16", r"shl.b32 \1, \2, 15"),
        Change(cuda, ADAMW, BF16, step, r"cvt\.rn\.bf16\.f32", "cvt.rn.f16.f32", 1),
        Change(cuda, ADAMW, BF16, step, r"st\.global\.u16", "st.global.u8", -1),
        Change(
            triton,
            ADAMW,
            BF16,
            step,
            r"cvt\.rn\.bf16x2\.f32 (\S+), (\S+), (\S+);",
            r"cvt.rn.bf16x2.f32 \1, \3, \2;",
        ),
        Change(triton, ADAMW, BF16, step, r"cvt\.f32\.bf16", "cvt.f32.f16"),
        # sums of a block, and passes
        Change(cuda, LAMB, F32, "reduce_norms", r"bar\.sync", None),
        Change(cuda, LAMB, F32, "reduce_norms", r"shfl", None),
        Change(cuda, LAMB, F32, "reduce_norms", r"add\.rn\.f64", "sub.rn.f64"),
        Change(
            cuda,
            LAMB,
            F32,
            "reduce_norms",
            r"ld\.shared\.f64 (\S+), \[(\w+)\+8\]",
            r"ld.shared.f64 \1, [\2+16]",
        ),
        Change(cuda, LAMB, F32, "finalize", r"div\.rn\.f64", "mul.rn.f64"),
        Change(cuda, LAMB, F32, "finalize", r"cvt\.rn\.f32\.f64", None),
        Change(cuda, FACTORED, F32, "reduce_gradient", r"bar\.sync", None),
        Change(cuda, FACTORED, F32, "reduce_gradient", r"div\.s32", "rem.s32"),
        Change(cuda, FACTORED, F32, "reduce_gradient", r"min\.s64", "max.s64"),
        Change(cuda, FACTORED, F32, "reduce_gradient", r"st\.shared\.f64", None),
        Change(cuda, FACTORED, F32, "update_factors", r"sqrt\.rn\.f64", "mov.f64"),
        Change(cuda, FACTORED, F32, "update_row_factors", r"rcp\.rn\.f64", "mov.f64"),
        Change(triton, LAMB, F32, "reduce_norms", r"shfl", None),
        Change(triton, LAMB, F32, "reduce_norms", r"bar\.sync", None),
        Change(triton, LAMB, F32, "finalize", r"sqrt\.rn\.f64", "mov.b64"),
    ]


@functools.cache
def expected(case: str, storage: Storage) -> Result:
    return results(BY_ID[case], storage, "reference")


def results(case: Case, storage: Storage, backend: str) -> Result:
    return run(case, storage, backend, wild=not case.reduces, steps=STEPS, layouts=LAYOUTS)


def check(case: str, storage: Storage, backend: str) -> None:
    """As the tests of unchanged code do."""
    got = results(BY_ID[case], storage, backend)
    if BY_ID[case].reduces:
        assert not far(got, expected(case, DOUBLE), LAYOUTS)
    else:
        assert_same(got, expected(case, storage), LAYOUTS)


@pytest.mark.parametrize(
    ("executed", "change"),
    [(change.backend, change) for change in changes()],
    indirect=["executed"],
    ids=lambda x: getattr(x, "id", ""),
)
def test_a_change_is_seen(change: Change, executed: Executor) -> None:
    executed.change, executed.steps = change, FOR_EVER
    with pytest.raises((AssertionError, Fault)):
        check(change.case, change.storage, executed.backend)


@pytest.mark.parametrize(
    ("executed", "case", "storage"),
    sorted({(change.backend, change.case, change.storage) for change in changes()}, key=str),
    indirect=["executed"],
    ids=lambda x: getattr(x, "id", x),
)
def test_without_a_change(case: str, storage: Storage, executed: Executor) -> None:
    executed.steps = FOR_EVER
    check(case, storage, executed.backend)
