"""How many instructions the CUDA kernels issue for an element, on 9.0. No GPU is needed."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

import sass_counts
from machine_code import built

# Most that an element may take in a turn of the hot loop: what it took when this was written, and 2% more;
# Adafactor in bf16 what leaves an H200's memory (some 20 bytes a clock and multiprocessor) the limit.
BOUNDS = {
    "lion f32": 20.2,
    "lion bf16": 22.6,
    "adamw f32": 42.6,
    "adamw bf16": 47.0,
    "lamb reduce_norms f32": 40.8,
    "lamb reduce_norms bf16": 43.9,
    "lamb apply f32": 41.5,
    "lamb apply bf16": 46.6,
    "adafactor reduce_gradient f32": 10.0,
    "adafactor reduce_gradient bf16": 10.0,
    "adafactor reduce_norms f32": 20.6,
    "adafactor reduce_norms bf16": 18.0,
    "adafactor apply f32": 21.0,
    "adafactor apply bf16": 18.0,
}


@pytest.fixture(scope="module")
def library() -> Path:
    return built.library()


@pytest.mark.parametrize("kernel", sass_counts.KERNELS, ids=lambda kernel: kernel.label)
def test_instructions_of_an_element(kernel: sass_counts.Kernel, library: Path) -> None:
    (instructions,) = sass_counts.listed(library, kernel.pattern).values()
    turn = sass_counts.hot_turn(instructions)
    assert turn.total() / kernel.elements <= BOUNDS[kernel.label], turn.most_common()
    # what an element cannot do without: the gradient's factor at least, in a turn of so many elements
    assert turn["FMUL"] >= kernel.elements
    if "f32" in kernel.label:
        assert not turn["LDL"] + turn["STL"]


def test_every_kernel_has_a_bound() -> None:
    assert [kernel.label for kernel in sass_counts.KERNELS] == list(BOUNDS)


LISTING = """
    Function : before
        /*0000*/                   MOV R1, c[0x0][0x28] ;                   /* 0x00 */
        /*0010*/                   EXIT ;                                   /* 0x00 */
    Function : kernel
        /*0000*/                   MOV R0, RZ ;                             /* 0x00 */
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;         /* 0x00 */
        /*0020*/              @P0  BRA 0x60 ;                               /* 0x00 */
        /*0030*/                   FADD R4, R4, R4 ;                        /* 0x00 */
        /*0040*/                   FADD R5, R5, R5 ;                        /* 0x00 */
        /*0050*/                   BRA 0x70 ;                               /* 0x00 */
        /*0060*/                   FMUL R4, R4, R4 ;                        /* 0x00 */
        /*0070*/              @!P1 BRA 0xb0 ;                               /* 0x00 */
        /*0080*/                   MOV R9, 0xb0 ;                           /* 0x00 */
        /*0090*/                   MOV R8, R4 ;                             /* 0x00 */
        /*00a0*/                   CALL.REL.NOINC 0x130 ;                   /* 0x00 */
        /*00b0*/              @!P2 STG.E.64 desc[UR4][R2.64], R4 ;          /* 0x00 */
        /*00c0*/                   ISETP.GE.AND P0, PT, R0, R1, PT ;        /* 0x00 */
        /*00d0*/              @!P0 BRA 0x10 ;                               /* 0x00 */
        /*00e0*/                   LDG.E.U16 R4, desc[UR4][R2.64] ;         /* 0x00 */
        /*00f0*/                   FFMA R4, R4, R4, R4 ;                    /* 0x00 */
        /*0100*/                   ISETP.GE.AND P0, PT, R0, R1, PT ;        /* 0x00 */
        /*0110*/              @!P0 BRA 0xe0 ;                               /* 0x00 */
        /*0120*/                   EXIT ;                                   /* 0x00 */
        /*0130*/                   RET.REL.NODEC R8 0x0 ;                   /* 0x00 */
"""


def test_the_hot_turn() -> None:
    """The loop of the widest accesses, the longer branch, no calls."""
    functions = sass_counts.parsed(LISTING)
    assert list(functions) == ["before", "kernel"]
    turn = sass_counts.hot_turn(functions["kernel"])
    assert turn == Counter(LDG=1, BRA=4, FADD=2, STG=1, ISETP=1)


def test_rows_that_are_asked_for_are_not_the_hot_turn() -> None:
    """Of paths that move as much, that whose loads are together: the others are taken at a tensor's edge."""
    edge = """
        /*0000*/              @P0  BRA 0x80 ;
        /*0010*/              @P1  LDG.E.64 R4, desc[UR4][R2.64] ;
        /*0020*/              @P2  LDG.E.64 R6, desc[UR4][R2.64] ;
        /*0030*/                   FADD R4, R4, R4 ;
        /*0040*/                   FADD R4, R4, R4 ;
        /*0050*/                   FADD R4, R4, R4 ;
        /*0060*/                   FADD R4, R4, R4 ;
        /*0070*/                   BRA 0xa0 ;
        /*0080*/                   LDG.E.64 R4, desc[UR4][R2.64] ;
        /*0090*/                   LDG.E.64 R6, desc[UR4][R2.64] ;
        /*00a0*/              @!P3 BRA 0x0 ;
        /*00b0*/                   EXIT ;
"""
    turn = sass_counts.hot_turn(sass_counts.parsed("Function : f\n" + edge)["f"])
    assert turn == Counter(BRA=2, LDG=2)
