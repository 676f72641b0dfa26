"""The interpreter of PTX: each instruction against numbers worked out otherwise, and what it must refuse."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from emulated import Emulated
from machine_code import code, machine, ptx
from machine_code.executed import missing
from machine_code.memory import RAW, Fault, Memory, RecentTensors
from machine_code.operations import TABLE
from machine_code.program import Program

THREADS = 64
REGISTERS = {0: "%p", 1: "%rs", 2: "%rs", 4: "%r", 8: "%rd"}
RAW_KIND = {1: "u8", 2: "b16", 4: "b32", 8: "b64"}


def kernel(body: str, parameters: int = 0, threads: int = THREADS, shared: int = 0) -> Program:
    """With a thread's number in %r1, and in %rd50 and so on parameters, which are addresses."""
    names = [f".param .u64 k_param_{i}" for i in range(parameters)]
    loads = [f"ld.param.u64 %rd{50 + i}, [k_param_{i}];" for i in range(parameters)]
    lines = [
        f".shared .align 16 .b8 room[{shared}];" if shared else "",
        ".visible .entry k(",
        ",\n".join(names),
        f")\n.maxntid {threads}, 1, 1\n{{",
        *(
            f".reg .{kind} {name}<60>;"
            for kind, name in zip(("pred", "b16", "b32", "b64"), ("%p", "%rs", "%r", "%rd"), strict=True)
        ),
        "mov.u32 %r1, %tid.x;",
        "mov.u32 %r2, %ctaid.x;",
        *loads,
        body,
        "ret;\n}",
    ]
    return Program(ptx.parse("\n".join(lines)))


def execute(program: Program, *arrays: np.ndarray, blocks: int = 1, memory: Memory | None = None) -> None:
    places = [array.ctypes.data for array in arrays]
    memory = memory or Memory((at, at + array.nbytes) for at, array in zip(places, arrays, strict=True))
    parameters = b"".join(place.to_bytes(8, "little") for place in places)
    machine.launch(program, parameters, blocks, memory, steps=10_000)


def addresses(of: int, size: int, to: str = "%rd40", thread: str = "%r1") -> str:
    """A thread's element of a parameter."""
    return f"mul.wide.u32 {to}, {thread}, {size}; add.s64 {to}, %rd{50 + of}, {to};"


def applied(opcode: str, *inputs: np.ndarray) -> np.ndarray:
    """An instruction's results, one input for each operand, as raw bits."""
    _, (kind, *kinds) = TABLE[opcode]
    count = len(inputs[0])
    assert count % 32 == 0
    lines, names = [], []
    for i, (k, values) in enumerate(zip(kinds, inputs, strict=True)):
        size = values.itemsize
        register = f"{REGISTERS[size]}{10 + i}"
        lines += [addresses(i, size), f"ld.global.{RAW_KIND[size]} {register}, [%rd40];"]
        if k == "pred":
            lines.append(f"setp.ne.b16 %p{10 + i}, {register}, 0;")
            register = f"%p{10 + i}"
        names.append(register)
    size = ptx.SIZES.get(kind, 0)
    result = f"{REGISTERS[size]}20"
    lines.append(f"{opcode} {', '.join([result, *names])};")
    if kind == "pred":
        lines.append("selp.b32 %r20, 1, 0, %p20;")
        size, result = 4, "%r20"
    lines += [addresses(len(inputs), size), f"st.global.{RAW_KIND[size]} [%rd40], {result};"]
    output = np.zeros(count, RAW[size])
    execute(
        kernel("\n".join(lines), len(inputs) + 1, threads=count), *map(np.ascontiguousarray, inputs), output
    )
    return output


# instructions

FLOATS = [0.0, -0.0, 1.0, -1.5, 1e-45, -1e-45, 1.2e-38, -6e-39, 3e38, -3e38, math.inf, -math.inf, math.nan]
FLOATS += [
    1 + 2**-8,
    1 + 3 * 2**-8,
    65504.0,
    65519.9,
    65520.0,
    5.9e-8,
    2.9e-8,
    3.4028235e38,
    0.1,
    1 / 3,
    7.5e8,
    2.0**31,
    -(2.0**31),
]
WORDS = [
    0,
    1,
    2,
    3,
    7,
    31,
    32,
    33,
    100,
    0x7FFFFFFF,
    0x80000000,
    0xFFFFFFFF,
    0xFFFFFFFE,
    0x12345678,
    0xCAFEBABE,
    12345,
]


def pairs(values: list[float] | list[int], dtype: Any) -> tuple[np.ndarray, np.ndarray]:
    """All of them, repeated to whole warps."""
    a, b = np.meshgrid(np.array(values, dtype), np.array(values, dtype))
    count = -(-a.size // 32) * 32
    return np.resize(a.ravel(), count), np.resize(b.ravel(), count)


@pytest.mark.parametrize("kind", ["f32", "f64"])
@pytest.mark.parametrize("name", ["add.rn", "sub.rn", "mul.rn", "div.rn"])
def test_arithmetic_of_floats(name: str, kind: str) -> None:
    """As torch rounds."""
    a, b = pairs(FLOATS, np.float32 if kind == "f32" else np.float64)
    torch_function = getattr(torch, {"div.rn": "true_divide"}.get(name, name.removesuffix(".rn")))
    want = torch_function(torch.from_numpy(a), torch.from_numpy(b)).numpy()
    assert np.array_equal(applied(f"{name}.{kind}", a, b).view(want.dtype), want, equal_nan=True)


COMPARED: dict[str, Callable[[float, float], bool]] = {
    "eq": lambda a, b: a == b, "lt": lambda a, b: a < b, "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b, "ge": lambda a, b: a >= b,
    "ne": lambda a, b: a < b or a > b,
}  # fmt: skip


@pytest.mark.parametrize("name", [*COMPARED, *(f"{n}u" for n in COMPARED), "num", "nan"])
def test_comparisons_with_nan(name: str) -> None:
    a, b = pairs(FLOATS, np.float32)
    got = applied(f"setp.{ {'neu': 'neu', 'equ': 'equ'}.get(name, name) }.f32".replace(" ", ""), a, b)
    for x, y, holds in zip(a.tolist(), b.tolist(), got, strict=True):
        unordered = math.isnan(x) or math.isnan(y)
        if name in ("num", "nan"):
            want = unordered == (name == "nan")
        else:
            want = unordered if unordered and name.endswith("u") else COMPARED[name[:2]](x, y)
        assert holds == want, (name, x, y)


def signed(x: int, bits: int) -> int:
    return x - (1 << bits) if x >> (bits - 1) else x


def whole(kind: str) -> Callable[[int], int]:
    """The number that bits mean."""
    return (lambda x: signed(x, int(kind[1:]))) if kind[0] == "s" else (lambda x: x)


INTEGERS: dict[str, Callable[..., int]] = {
    "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul.lo": lambda a, b: a * b,
    "min": min, "max": max,
}  # fmt: skip


@pytest.mark.parametrize("kind", ["s32", "u32", "s64", "u64"])
def test_whole_numbers(kind: str) -> None:
    """As Python's numbers of any length, cut to the bits there are."""
    bits = int(kind[1:])
    known = WORDS if bits == 32 else [*WORDS[:8], 1 << 63, (1 << 64) - 1, (1 << 63) - 1, 0x123456789ABCDEF]
    a, b = pairs(known, RAW[bits // 8])
    of = whole(kind)
    functions = {
        **INTEGERS,
        "mul.hi": lambda x, y: x * y >> bits,
        "shr": lambda x, y: x >> y if y < bits else -(x < 0),
    }
    for name, function in functions.items():
        amounts = np.minimum(b, 200).astype(np.uint32) if name == "shr" else b
        got = applied(f"{name}.{kind}", a, amounts)
        want = [
            function(of(x), y if name == "shr" else of(y))
            for x, y in zip(a.tolist(), amounts.tolist(), strict=True)
        ]
        assert got.tolist() == [x & ((1 << bits) - 1) for x in want], name
    some = np.where(b == 0, 5, b).astype(b.dtype)
    for name in ("div", "rem"):
        got = applied(f"{name}.{kind}", a, some)
        for x, y, result in zip(map(of, a.tolist()), map(of, some.tolist()), got.tolist(), strict=True):
            quotient = abs(x) // abs(y) * (1 if (x < 0) == (y < 0) else -1)
            assert result == (quotient if name == "div" else x - quotient * y) & ((1 << bits) - 1)


def test_products_of_twice_the_width_and_shifts() -> None:
    a, b = pairs(WORDS, np.uint32)
    c = np.arange(len(a), dtype=np.uint64)
    for kind in ("s32", "u32"):
        of = whole(kind)
        want = [of(x) * of(y) for x, y in zip(a.tolist(), b.tolist(), strict=True)]
        assert applied(f"mul.wide.{kind}", a, b).tolist() == [x & ((1 << 64) - 1) for x in want]
        added = [x + i & ((1 << 64) - 1) for i, x in enumerate(want)]
        assert applied(f"mad.wide.{kind}", a, b, c).tolist() == added
    shifted = [x << y & 0xFFFFFFFF if y < 32 else 0 for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    assert applied("shl.b32", a, b).tolist() == shifted


def test_fields_and_bytes() -> None:
    a, b = pairs(WORDS, np.uint32)
    first, length = b & 31, np.uint32(1) + (b >> 3) % 32
    want = [
        x >> i & ((1 << n) - 1) for x, i, n in zip(a.tolist(), first.tolist(), length.tolist(), strict=True)
    ]
    assert applied("bfe.u32", a, first, length).tolist() == want
    selector = np.resize(np.array([0x7604, 0x3210, 0x5410, 0x7632, 0x0123, 0x888F], np.uint32), len(a))

    def permuted(x: int, y: int, s: int) -> int:
        both = x.to_bytes(4, "little") + y.to_bytes(4, "little")
        chosen = [(both[s >> 4 * i & 7], s >> 4 * i & 8) for i in range(4)]
        return int.from_bytes(bytes(255 * (byte >> 7) if sign else byte for byte, sign in chosen), "little")

    want = [permuted(*x) for x in zip(a.tolist(), b.tolist(), selector.tolist(), strict=True)]
    assert applied("prmt.b32", a, b, selector).tolist() == want


@pytest.mark.parametrize(("kind", "dtype"), [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_conversions_to_16_bits_and_back(kind: str, dtype: torch.dtype) -> None:
    """Between two neighbours to the even one, to infinity, to subnormals; NaN as a GPU makes it."""
    random = torch.arange(1 << 14, dtype=torch.int64).mul(262_147).to(torch.int32).view(torch.float32)
    for x in (torch.tensor(FLOATS + FLOATS[:6]), *random.split(1024)):
        want = x.to(dtype)
        bits = (
            torch.where(x.isnan(), 0x7FFF, want.view(torch.int16).to(torch.int32) & 0xFFFF)
            .numpy()
            .astype(np.uint16)
        )
        a = x.numpy()
        assert np.array_equal(applied(f"cvt.rn.{kind}.f32", a), bits)
        pair = applied(f"cvt.rn.{kind}x2.f32", a, a[::-1])
        assert np.array_equal(pair >> 16, bits)
        assert np.array_equal(pair & 0xFFFF, bits[::-1])
        back = applied(f"cvt.f32.{kind}", bits).view(np.float32)
        assert np.array_equal(back, want.float().numpy(), equal_nan=True)


def test_other_conversions() -> None:
    a = np.array(FLOATS + FLOATS[:6], np.float32)
    cut = [0 if math.isnan(x) else int(min(max(x, -(2**31)), 2**31 - 1)) for x in a.tolist()]
    assert applied("cvt.rzi.s32.f32", a).view(np.int32).tolist() == cut
    doubles = np.resize(
        np.array([0.1, 1 / 3, 1e-50, 1e39, -1e39, 1 + 2**-24, 1 + 3 * 2**-24, 2.0**-149 * 0.5]), 32
    )
    want = torch.from_numpy(doubles).float().numpy()
    assert np.array_equal(applied("cvt.rn.f32.f64", doubles).view(np.float32), want)
    words = np.resize(np.array(WORDS, np.uint32), 32)
    assert applied("cvt.s64.s32", words).view(np.int64).tolist() == [signed(x, 32) for x in words.tolist()]
    assert applied("cvt.u64.u32", words).tolist() == words.tolist()
    assert (
        applied("cvt.rn.f32.s32", words).view(np.float32).tolist()
        == words.view(np.int32).astype(np.float32).tolist()
    )
    long = np.resize(np.array([2**53 + 1, -(2**60) - 1, 5], np.int64), 32)
    assert applied("cvt.rn.f64.s64", long).view(np.float64).tolist() == [float(x) for x in long.tolist()]


def test_fma_rounds_once() -> None:
    rng = np.random.default_rng(0)
    a, b, c = rng.standard_normal((3, 96))
    c[:32] = -a[:32] * b[:32]  # what the product was rounded by
    a[64:], b[64:] = a[64:].astype(np.float32), b[64:].astype(np.float32)
    want = [float(Fraction(x) * Fraction(y) + Fraction(z)) for x, y, z in zip(a, b, c, strict=True)]
    assert applied("fma.rn.f64", a, b, c).view(np.float64).tolist() == want
    assert any(x for x in want[:32])


def test_roots_signs_and_choices() -> None:
    a, b = pairs(FLOATS, np.float32)
    root = torch.from_numpy(a).double().sqrt().float().numpy()
    assert np.array_equal(applied("sqrt.rn.f32", a).view(np.float32), root, equal_nan=True)
    assert np.array_equal(
        applied("rcp.rn.f32", a).view(np.float32), torch.from_numpy(a).reciprocal().numpy(), equal_nan=True
    )
    assert np.array_equal(applied("neg.f32", a), a.view(np.uint32) ^ 0x80000000)
    which = np.arange(len(a), dtype=np.uint16) % 2
    assert np.array_equal(applied("selp.f32", a, b, which), np.where(which, a, b).view(np.uint32))


def test_halves_of_registers_and_constants() -> None:
    out = np.zeros(THREADS, np.uint64)
    body = """
        mov.b32 %r10, 0f3F800001; mov.b32 {%rs1, %rs2}, %r10; mov.b32 %r11, {%rs2, %rs1};
        mov.b64 %rd10, {%r11, %r1}; mov.b64 {_, %r12}, %rd10; add.s32 %r13, %r12, -1;
        mov.b64 %rd11, {%r11, %r13};
    """
    execute(kernel(body + addresses(0, 8) + "st.global.b64 [%rd40], %rd11;", 1), out)
    assert out.tolist() == [(i - 1 & 0xFFFFFFFF) << 32 | 0x00013F80 for i in range(THREADS)]


# control, shared memory, shuffles


def test_threads_part_and_meet() -> None:
    """Each thread turns another number of times; a predicate holds for some."""
    out = np.zeros(3 * THREADS, np.uint32)
    body = f"""
        mov.u32 %r10, 0; mov.u32 %r11, 0;
        $L__AGAIN: setp.ge.u32 %p1, %r10, %r1;
        @%p1 bra $L__DONE;
        add.s32 %r11, %r11, %r10; add.s32 %r10, %r10, 1;
        bra.uni $L__AGAIN;
        $L__DONE: and.b32 %r12, %r1, 1; setp.eq.b32 %p2, %r12, 0;
        @!%p2 add.s32 %r11, %r11, 1000;
        shfl.sync.bfly.b32 %r13|%p3, %r11, 1, 31, -1;
        mul.lo.s32 %r14, %r2, {THREADS}; add.s32 %r14, %r14, %r1;
    """
    execute(kernel(body + addresses(0, 4, thread="%r14") + "st.global.b32 [%rd40], %r13;", 1), out, blocks=3)
    sums = [i * (i - 1) // 2 + 1000 * (i % 2) for i in range(THREADS)]
    assert out.tolist() == [sums[i ^ 1] for i in range(THREADS)] * 3


def exchanged(between: str) -> np.ndarray:
    """Each thread reads what the last but its own number wrote."""
    out = np.zeros(THREADS, np.uint32)
    body = f"""
        shl.b32 %r10, %r1, 2; mov.u32 %r11, room; add.s32 %r10, %r10, %r11;
        st.shared.b32 [%r10], %r1;
        {between}
        sub.s32 %r12, {THREADS - 1}, %r1; shl.b32 %r12, %r12, 2; add.s32 %r12, %r12, %r11;
        ld.shared.b32 %r13, [%r12];
    """
    program = kernel(body + addresses(0, 4) + "st.global.b32 [%rd40], %r13;", 1, shared=4 * THREADS)
    execute(program, out)
    return out


def test_shared_memory() -> None:
    assert exchanged("bar.sync 0;").tolist() == list(range(THREADS))[::-1]
    with pytest.raises(Fault, match="reads what another warp writes"):
        exchanged("")


def test_what_no_one_has_written_is_garbage() -> None:
    out = np.zeros((2, THREADS), np.uint32)
    body = addresses(0, 8) + "ld.shared.b32 %r11, [room]; st.global.v2.b32 [%rd40], {%r10, %r11};"
    execute(kernel(body, 1, shared=16), out)
    assert out.ravel().tolist() == [0xDEADBEEF, 0x7F7F7F7F] * THREADS


# what is refused

REFUSED = {
    "outside": ("ld.global.b32 %r10, [%rd50+256];", r"access of 4 bytes at .*\+0 bytes from the end"),
    "before": ("ld.global.b32 %r10, [%rd50+-4];", "access of 4 bytes"),
    "half outside": ("ld.global.v2.b32 {%r10, %r11}, [%rd50+252];", "misaligned access of 8 bytes"),
    "misaligned": ("st.global.v4.b32 [%rd50+8], {%r1, %r1, %r1, %r1};", "misaligned access of 16 bytes"),
    "nowhere": ("mov.u64 %rd1, 64; st.global.b32 [%rd1], %r1;", "no tensor lies there"),
    "shared": ("ld.shared.b32 %r10, [room+16];", "outside of 16 bytes of shared memory"),
    "shared misaligned": ("ld.shared.v2.b32 {%r10, %r11}, [room+4];", "misaligned access of shared"),
    "shared twice": ("st.shared.b32 [room], %r1;", "writes what another thread writes"),
    "parameters": ("ld.param.b64 %rd1, [k_param_0+8];", "outside of the parameters"),
    "division": ("mov.u32 %r10, 0; div.s32 %r11, %r1, %r10;", "division by zero"),
    "for ever": ("$L__HERE: bra $L__HERE;", "too many instructions"),
    "some leave": ("setp.gt.u32 %p1, %r1, 40; @%p1 ret; bar.sync 0;", "the others of the warp or block"),
    "torn shuffle": ("setp.gt.u32 %p1, %r1, 40; @%p1 bra $L__E;\n"
        "shfl.sync.bfly.b32 %r10, %r1, 1, 31, -1; $L__E:", "the others of the warp"),
    "part of a warp": ("shfl.sync.bfly.b32 %r10, %r1, 1, 31, 255;", "not between all lanes"),
    "flushing": ("add.rn.ftz.f32 %r10, %r1, %r1;", "not understood"),
    "approximate": ("div.approx.f32 %r10, %r1, %r1;", "not understood"),
    "contraction": ("fma.rn.f32 %r10, %r1, %r1, %r1;", "not understood"),
    "rounding": ("add.rz.f32 %r10, %r1, %r1;", "not understood"),
    "no rounding": ("add.f32 %r10, %r1, %r1;", "not understood"),
    "saturation": ("add.sat.s32 %r10, %r1, %r1;", "not understood"),
    "atomics": ("atom.global.add.f32 %r10, [%rd50], %r1;", "not understood"),
    "generic": ("ld.b32 %r10, [%rd50];", "not understood"),
    "width": ("add.s64 %rd1, %r1, %r1;", "not understood: a register of 4 bytes for s64"),
    "constant": ("add.s32 %r10, %r1, 4294967296;", "does not fit"),
    "barrier": ("bar.sync 1;", "not understood: another barrier"),
    "dimension": ("mov.u32 %r10, %tid.y;", "not understood: grids of one dimension"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    body, message = REFUSED[name]
    program = kernel(re.sub(r"(\$\w+:)$", r"\1 mov.u32 %r20, 0;", body), 1, shared=16)
    room = np.zeros(2 * THREADS, np.uint32)
    aligned = room[-room.ctypes.data % 16 // 4 :][:THREADS]
    with pytest.raises(Fault, match=message):
        execute(program, aligned)


def test_neighbours_are_apart() -> None:
    """An access that begins in one tensor and ends in the next."""
    room = np.zeros(32, np.uint8)
    first = room.ctypes.data + -room.ctypes.data % 16
    memory = Memory([(first, first + 4), (first + 4, first + 8)])
    memory.load(np.array([first, first + 4], np.uint64), 4)
    with pytest.raises(Fault, match=r"access of 8 bytes"):
        memory.load(np.array([first], np.uint64), 4, 2)


def test_a_launch_has_the_parameters_that_the_code_takes() -> None:
    with pytest.raises(Fault, match="takes 8 bytes of parameters, a launch gave 16"):
        machine.launch(kernel("", 1), bytes(16), 1, Memory([]))


def test_only_what_lives_is_memory() -> None:
    with RecentTensors() as tensors:
        x, y = torch.zeros(64), torch.zeros(64)
        at = np.array([y.data_ptr()], np.uint64)
        tensors.memory().load(at, 4)
        del y
        with pytest.raises(Fault, match="access of 4 bytes"):
            tensors.memory().load(at, 4)
        tensors.memory().load(np.array([x.data_ptr(), x.data_ptr() + 252], np.uint64), 4)


# the built module


def test_kernels_have_the_names_of_those_that_launch_them(cuda: Emulated) -> None:
    library = code.library() or missing("danlu._cuda")
    assert library is not None
    assert cuda.native is not None
    compiled = code.ptx(library)
    assert set(code.symbols(Path(cuda.native.__file__ or "")).values()) >= set(compiled)
    used = {
        name
        for text in compiled.values()
        for name in re.findall(r"^(?:@!?%p\d+ )?([a-z][\w.]*) [%\[{$]", text, re.MULTILINE)
    }
    control = {"bra", "bra.uni", "ret", "bar.sync", "shfl.sync.bfly.b32", "cvta.to.global.u64"}
    unknown = {name for name in used - control - set(TABLE) if not name.startswith(("ld.", "st.", "mov."))}
    assert not unknown
