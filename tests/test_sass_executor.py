"""What the executor of machine code refuses and notices: it would be worth nothing if it let things pass."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch

from danlu.testing import same_bits
from machine_code import constants
from machine_code.memory import Fault, Memory
from machine_code.sass import floats
from machine_code.sass.machine import Instruction, Launch, Machine, Program, Unknown, listed

END = "EXIT"


def assembled(*lines: str) -> list[Instruction]:
    """As cuobjdump prints them."""
    text = [f"        /*{16 * i:04x}*/                   {line} ;" for i, line in enumerate(lines)]
    return listed("\n".join(["\t\tFunction : k", *text]))["k"]


def ran(*lines: str, parameters: bytes = bytes(64), memory: Memory | None = None, seed: int = 0) -> Machine:
    launch = Launch(parameters, blocks=1, threads=32)
    (machine,) = Program(assembled(*lines, END)).run(launch, memory or Memory([]), seed=seed)
    return machine


@pytest.mark.parametrize(
    "line",
    [
        "DADD R0, R2, R4",
        "FADD.RM R0, R1, R2",
        "FADD.FTZ.FTZ R0, R1, R2",
        "FADD R0, R1, R2, R3",
        "FADD R0, R1, ~R2",
        "MOV R0, c[0x0][0x210]",
        "MOV R0, -R1",
        "LDC R0, c[0x3][0x210]",
        "LDC.U8 R0, c[0x0][0x210]",
        "IADD3 R0, P0, P1, R1, R2, R3",
        "IADD3 R0, P0, R1, -R2, RZ",
        "IADD3.X R0, R1, R2, R3, P0",
        "IMAD.HI R0, R1, R2, R3",
        "ISETP.GE.XOR P0, PT, R1, R2, PT",
        "ISETP.GE.AND P0, P1, R1, R2, PT",
        "SHF.R.U64 R0, R1, 0x2, R3",
        "SHF.L.U32 R0, R1, 0x2, R3",
        "LOP3.LUT R0, R1, R2, R3, 0xc0, PT",
        "PRMT R0, R1, R2, R3",
        "MUFU.EX2 R0, R1",
        "LDG.E.128 R2, desc[UR4][R8.64]",
        "LDG.E.STRONG.GPU R0, desc[UR4][R8.64]",
        "LDG.E R0, desc[UR4][R8.64], P0",
        "LDG.E R0, [R8.64]",
        "STG.E.U8 desc[UR4][R8.64], R0",
        "UIADD3 UR0, R1, UR2, URZ",
        "BAR.SYNC 0x0",
        "RET.ABS.NODEC R20 0x0",
        "MOV R0, R1, R2",
        "@P0 DADD R0, R2, R4",
    ],
)
def test_what_is_not_known_is_an_error(line: str) -> None:
    with pytest.raises(Unknown, match=re.escape(line.split("@P0 ")[-1])):
        ran(line)


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        (["LDC R0, c[0x0][0x250]"], "constant read of 4 bytes at 0x250"),
        (["LDC.64 R0, c[0x0][0x214]"], "constant read of 8 bytes at 0x214"),
        (["LDC R0, c[0x0][0x2c]"], "constant read of 4 bytes at 0x2c"),
        (["BRA 0x8"], "jump to 0x8"),
        (["BRA 0x0"], "does not end"),
        (
            ["ULDC.64 UR4, c[0x0][0x208]", "CS2R R2, SRZ", "LDG.E R0, desc[UR4][R2.64]"],
            "no tensor lies there",
        ),
        (["CS2R R2, SRZ", "LDG.E R0, desc[UR4][R2.64]"], "not the descriptor"),
        (["S2R R1, SR_TID.X", "R2UR UR4, R1"], "several values"),
    ],
)
def test_what_a_gpu_would_do_wrong_is_a_fault(lines: list[str], reason: str) -> None:
    with pytest.raises(Fault, match=reason):
        ran(*lines)


def test_constant_addresses_do_not_wrap() -> None:
    parameters = np.arange(31 * 256, dtype=np.uint32).tobytes()
    good = ran("MOV R2, 0x7e00", "LDC R0, c[0x0][R2+-0x7bf0]", parameters=parameters)
    assert (good.registers[0] == 0).all()
    with pytest.raises(Fault, match="constant read of 4 bytes at -0x7df0"):
        ran("MOV R2, RZ", "LDC R0, c[0x0][R2+-0x7df0]", parameters=parameters)
    with pytest.raises(Fault, match="constant read of 4 bytes at 0x10210"):
        ran("MOV R2, 0x10000", "LDC R0, c[0x0][R2+0x210]", parameters=parameters)


def test_registers_start_as_garbage() -> None:
    first, again, other = (ran("NOP", seed=seed).registers for seed in (0, 0, 1))
    assert (first == again).all()
    assert (first != other).any()
    assert len(np.unique(first[0])) == 32


def test_a_uniform_register_is_one_for_the_warp() -> None:
    """Whoever writes it: threads that took the other branch see the new value."""
    machine = ran(
        "UMOV UR4, 0x1",
        "S2R R0, SR_TID.X",
        "ISETP.GE.AND P0, PT, R0, 0x7, PT",
        "@P0 BRA 0x50",
        "UMOV UR4, 0x2",
        "MOV R1, UR4",
    )
    assert (machine.registers[1] == 2).all()


def test_threads_wait_for_those_that_branched() -> None:
    """A warp is whole behind BSYNC, which shows in what is one for all of it."""
    lines = [
        "S2R R0, SR_TID.X",
        "ISETP.GE.AND P0, PT, R0, 0x7, PT",
        "BSSY B0, 0x60",
        "@P0 BRA 0x90",
        "MOV R1, 0x1",
        "BRA 0x60",
        "BSYNC B0",
        "R2UR UR5, R1",
        "EXIT",
        "MOV R1, 0x2",
        "BRA 0x60",
    ]
    with pytest.raises(Fault, match="several values"):
        ran(*lines)
    lines[6] = "NOP"
    assert (ran(*lines).registers[1] == np.where(np.arange(32) < 7, 1, 2)).all()


def test_threads_that_wait_in_vain_are_a_fault() -> None:
    lines = ["S2R R0, SR_TID.X", "ISETP.GE.AND P0, PT, R0, 0x7, PT", "BSSY B0, 0x50", "BSSY B1, 0x70"]
    with pytest.raises(Fault, match="do not come"):
        ran(*lines, "@P0 BRA 0x70", "BSYNC B0", "EXIT", "BSYNC B1")


def test_fused_operations_round_once() -> None:
    """Against whole numbers of Python, in every mode."""
    random = np.random.default_rng(0)
    a, b, c = (random.standard_normal(4000).astype(np.float32) for _ in range(3))
    c[::2] = -(a * b)[::2] * np.float32(1 + 2**-20)  # cancels
    c[::3] *= np.float32(1e-7)
    exact = [_whole(x) * _whole(y) + (_whole(z) << 150) for x, y, z in zip(a, b, c, strict=True)]
    for mode in ("RN", "RM", "RP", "RZ"):
        for value, result in zip(exact, floats.fused(a, b, c, mode), strict=True):
            below, above = _around(value)
            nearest = {x for x in (below, above) if 2 * abs(x - value) <= above - below}
            wanted = {"RM": {below}, "RP": {above}, "RZ": {below if value > 0 else above}, "RN": nearest}
            assert _whole(result) << 150 in wanted[mode]


def test_a_fused_operation_is_not_rounded_to_float64_first() -> None:
    """1 + 2^-24, a tie, and 2^-70 more, which float64 would lose."""
    a, b, c = (np.full(1, x, np.float32) for x in (24929 / 2**12, 673 / 2**12, 2.0**-70))
    assert floats.fused(a, b, c) == np.float32(1 + 2**-23)
    assert floats.fused(-a, b, -c) == np.float32(-1 - 2**-23)
    assert floats.fused(a, b, -c) == 1


def test_approximations_are_loose() -> None:
    x = np.linspace(1, 4, 1000, dtype=np.float32)
    for function, exact, most in (("RCP", 1 / x, 1), ("RSQ", 1 / np.sqrt(x.astype(np.float64)), 2)):
        found = floats.approximate(function, x, np.random.default_rng(0))
        steps = found.view(np.int32) - exact.astype(np.float32).view(np.int32)
        assert {*steps.tolist()} == {*range(-most, most + 1)}
    with np.errstate(all="ignore"):
        subnormal = floats.approximate("RCP", np.full(100, 8e-39, np.float32), np.random.default_rng(0))
    assert 0 < np.isinf(subnormal).sum() < 100


def test_conversions_round_as_torch_does() -> None:
    bits = np.random.default_rng(0).integers(0, 1 << 32, 20_000, np.uint32)
    bits[::2] &= np.uint32(0xFFFF8000)  # ties of bf16
    bits[::3] &= np.uint32(0xFFFFF000)  # and of fp16
    x = bits.view(np.float32)
    with np.errstate(all="ignore"):
        found = [(torch.bfloat16, floats.to_bf16(x)), (torch.float16, floats.to_f16(x))]
    for dtype, converted in found:
        got = torch.from_numpy(converted.astype(np.int16)).view(dtype)
        assert same_bits(got, torch.from_numpy(x.copy()).to(dtype))


def test_a_division_may_always_take_the_slow_way() -> None:
    one = np.ones(2000, np.float32)
    assert 0 < floats.needs_slow_division(one, one, np.random.default_rng(0)).sum() < 100
    for a, b in ((1e-38, 1.0), (1.0, 1e-38), (1e30, 1e-10), (1e-20, 1e20), (np.inf, 1.0), (1.0, np.nan)):
        operands = (np.full(1, x, np.float32) for x in (a, b))
        assert floats.needs_slow_division(*operands, np.random.default_rng(0)).all()


def _whole(x: np.float32) -> int:
    """Times 2^150."""
    mantissa, exponent = math.frexp(float(x))
    return int(mantissa * 2**24) << exponent + 126


def _around(value: int) -> tuple[int, int]:
    """The neighbours with 24 bits."""
    step = 1 << max(0, abs(value).bit_length() - 24)
    return value // step * step, -(-value // step) * step


# how ptxas 13.0 reads coefficients from parameter offset 0x7ff8 on, where a list of 32,764 bytes ends
ASTRAY = """
    IADD3 R38, R6.reuse, 0x10000, RZ ;
    VIADD R36, R6.reuse, 0x10000 ;
    LDC R4, c[0x0][R6+-0x7df4] ;
    LDC R36, c[0x0][R36+-0x7df0] ;
    LDC R38, c[0x0][R38+-0x7de8] ;
    UIADD3 UR9, UR24, 0x10000, URZ ;
    ULDC UR15, c[0x0][UR24+-0x7df8] ;
    ULDC UR9, c[0x0][UR9+-0x7dec] ;
    IADD3 R37, PT, PT, R6.reuse, 0x10000, RZ ;
    LDC R37, c[0x0][R37+-0x7c7c] ;
    LDC R4, c[0x0][R6+-0x7c84] ;
"""
RIGHT = """
    @!P0 IADD3 R7, R7, 0x10000, RZ ;
    @!P0 LDC R27, c[0x0][R7+-0x7df0] ;
    LDC.64 R2, c[0x0][R10+0x228] ;
    ULDC UR6, c[0x0][UR6+0x7e28] ;
    MOV R5, c[0x0][0x210] ;
"""


def test_reads_that_go_astray_are_named() -> None:
    assert constants.uncompensated(ASTRAY.splitlines()) == [
        line for line in ASTRAY.splitlines() if "[R6+" in line or "[UR24+" in line
    ]
    assert not constants.uncompensated(RIGHT.splitlines())


@pytest.mark.parametrize("between", ["MOV R7, R8 ;", "LDG.E.128 R4, desc[UR4][R8.64] ;", "CS2R R6, SRZ ;"])
def test_an_index_counts_until_it_is_overwritten(between: str) -> None:
    lines = ["VIADD R7, R6, 0x10000 ;", between, "LDC R4, c[0x0][R7+-0x7df4] ;"]
    assert constants.uncompensated(lines) == [lines[-1]]
    assert not constants.uncompensated([lines[0], "STG.E desc[UR4][R6.64], R7 ;", lines[-1]])
