"""A kernel's instructions as functions over the threads that execute them."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .memory import RAW, Fault
from .operations import DTYPES, TABLE, Values
from .ptx import SIZES, Instruction, Kernel

if TYPE_CHECKING:
    from .machine import Machine, Threads

Read = Callable[["Machine", "Threads"], Values]
Write = Callable[["Machine", "Threads", Values], None]
Run = Callable[["Machine", "Threads"], None]

EVERY_LANE = 0xFFFFFFFF
_IMMEDIATE = re.compile(r"-?(?:0x[0-9a-fA-F]+|\d+)U?")
_ADDRESS = re.compile(r"\[ *([%$\w]+?) *(?:\+ *(-?\d+))? *\]")
_MEMORY = re.compile(r"(ld|st)\.(global|param|shared)(?:\.v([24]))?\.(\w+)")


@dataclass(slots=True)
class Step:
    """What an instruction does: runs, waits for its warp or block, or branches; to the end without target."""

    predicate: int | None
    negated: bool
    run: Run | None = None
    synchronizes: str | None = None  # "warp" or "block"
    exchange: Run | None = None  # when all are there
    target: int | None = None


class Program:
    """A kernel, ready to be executed: an instruction is read when it first is, which most never are."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.register_sizes = [0] * kernel.register_count
        ranges = sorted(kernel.registers.values())
        for (first, size), (end, _) in zip(ranges, [*ranges[1:], (kernel.register_count, 0)], strict=True):
            self.register_sizes[first:end] = [size] * (end - first)
        self.steps: list[Step | None] = [None] * len(kernel.code)

    def step(self, at: int) -> Step:
        step = self.steps[at]
        if step is None:
            step = self.steps[at] = self._step(self.kernel.code[at])
        return step

    def _step(self, instruction: Instruction) -> Step:
        name = instruction.predicate
        step = Step(self.kernel.register(name)[0] if name else None, instruction.negated)
        opcode, operands = instruction.opcode, instruction.operands
        try:
            if opcode == "ret":
                () = operands
            elif opcode in ("bra", "bra.uni"):
                (label,) = operands
                step.target = self.kernel.labels[label]
            elif opcode == "bar.sync":
                (barrier,) = operands
                assert barrier == "0", "another barrier"
                step.synchronizes = "block"
            elif opcode.startswith("griddepcontrol."):  # launches are executed one after the other
                () = operands
                step.run = lambda machine, threads: None
            elif opcode == "shfl.sync.bfly.b32":
                step.synchronizes, step.exchange = "warp", _shuffle(self.kernel, *operands)
            else:
                step.run = _run(self.kernel, opcode, operands)
        except (AssertionError, KeyError, SyntaxError, TypeError, ValueError) as error:
            raise Fault(f"{self.kernel.name}: {instruction} is not understood: {error}") from error
        return step


def _run(kernel: Kernel, opcode: str, operands: tuple[str, ...]) -> Run:
    if memory := _MEMORY.fullmatch(opcode):
        return _access(kernel, operands, *memory.groups())
    if opcode.startswith("mov."):
        return _move(kernel, opcode.removeprefix("mov."), *operands)
    if opcode == "cvta.to.global.u64":  # the generic address of global memory is the same
        return _move(kernel, "u64", *operands)
    function, (kind, *kinds) = TABLE[opcode]
    to, *of = operands
    write = _writer(kernel, to, kind)
    wider = opcode.startswith("cvt.")
    reads = [_reader(kernel, text, k, wider=wider) for text, k in zip(of, kinds, strict=True)]
    if len(reads) == 1:
        (a,) = reads
        return lambda machine, threads: write(machine, threads, function(a(machine, threads)))
    if len(reads) == 2:
        a, b = reads
        return lambda m, threads: write(m, threads, function(a(m, threads), b(m, threads)))
    a, b, c = reads
    return lambda m, threads: write(m, threads, function(a(m, threads), b(m, threads), c(m, threads)))


# operands


def _reader(kernel: Kernel, text: str, kind: str, *, wider: bool = False) -> Read:
    """wider: a register may have more bits than the type, of which the lowest count."""
    dtype = np.dtype(DTYPES[kind])
    if text.startswith(("%tid.", "%ctaid.", "%ntid.", "%nctaid.")):
        assert text.endswith(".x"), "grids of one dimension"
        assert dtype.itemsize == 4

        def special(machine: Machine, threads: Threads) -> Values:
            values = machine.special[text]
            return (values if threads is None or not values.ndim else values[threads]).view(dtype)

        return special
    if text.startswith("%"):
        return _register_reader(*kernel.register(text), kind, dtype, wider)
    constant = _constant(kernel, text, kind, dtype)
    return lambda machine, threads: constant


def _register_reader(number: int, size: int, kind: str, dtype: np.dtype[Any], wider: bool) -> Read:
    bits = 0 if kind == "pred" else dtype.itemsize
    if size == bits:

        def whole(machine: Machine, threads: Threads) -> Values:
            values = machine.registers[number]
            if threads is not None:
                values = values[threads]
            return values if values.dtype is dtype else values.view(dtype)

        return whole
    assert wider, f"a register of {size} bytes for {kind}"
    assert size > bits > 0, f"a register of {size} bytes for {kind}"

    def part(machine: Machine, threads: Threads) -> Values:
        values = machine.registers[number]
        if threads is not None:
            values = values[threads]
        return values.view(RAW[size]).astype(RAW[bits]).view(dtype)

    return part


def _constant(kernel: Kernel, text: str, kind: str, dtype: np.dtype[Any]) -> Values:
    if bits := re.fullmatch(r"0([fd])([0-9a-fA-F]+)", text):
        size = {"f": 4, "d": 8}[bits[1]]
        assert (size, 2 * size) == (dtype.itemsize, len(bits[2])), f"{text} for {kind}"
        return RAW[size](int(bits[2], 16)).view(dtype)
    if text in kernel.parameters:
        value = kernel.parameters[text][0]
    elif text in kernel.shared:
        value = kernel.shared[text]
    elif _IMMEDIATE.fullmatch(text) and kind not in ("f32", "f64"):
        value = int(text.rstrip("U"), 0)
    else:
        raise SyntaxError(f"operand {text}")
    if kind == "pred":
        return np.bool_(value)
    wrapped = value & ((1 << 8 * dtype.itemsize) - 1)
    assert value in (wrapped, wrapped - (1 << 8 * dtype.itemsize)), "a constant that does not fit"
    return RAW[dtype.itemsize](wrapped).view(dtype)


def _writer(kernel: Kernel, text: str, kind: str, *, wider: bool = False) -> Write:
    """wider: a register may have more bits than the type, which is then extended."""
    number, size = kernel.register(text)
    bits = 0 if kind == "pred" else SIZES[kind]
    extended: Any = None
    if size != bits:
        assert wider, f"a register of {size} bytes for {kind}"
        assert size > bits > 0, f"a register of {size} bytes for {kind}"
        assert kind[0] in "usb", f"{kind} is not extended"
        extended = DTYPES[f"{'s' if kind[0] == 's' else 'u'}{8 * size}"]

    def write(machine: Machine, threads: Threads, values: Values) -> None:
        if extended is not None:
            values = values.astype(extended)
        if threads is None:
            machine.registers[number] = values if values.ndim else np.full(machine.count, values)
            return
        old = machine.registers[number]
        if not old.flags.writeable:
            old = machine.registers[number] = old.copy()
        (old if old.dtype is values.dtype else old.view(values.dtype))[threads] = values

    return write


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.strip("{}").split(",")]


# moves and memory


def _move(kernel: Kernel, kind: str, to: str, source: str) -> Run:
    parts, whole = (to, source) if to.startswith("{") else (source, to)
    if not parts.startswith("{"):
        write, read = _writer(kernel, to, kind), _reader(kernel, source, kind)
        return lambda machine, threads: write(machine, threads, read(machine, threads).copy())
    names = _names(parts)
    size = SIZES[kind] // len(names)
    small = f"b{8 * size}"
    if parts is source:
        write, reads = _writer(kernel, whole, kind), [_reader(kernel, name, small) for name in names]

        def pack(machine: Machine, threads: Threads) -> None:
            pieces = np.broadcast_arrays(*(read(machine, threads) for read in reads))
            packed = np.ascontiguousarray(np.stack(pieces, -1)).view(RAW[SIZES[kind]])
            write(machine, threads, packed[..., 0])

        return pack
    read = _reader(kernel, whole, kind)
    writes = [(i, _writer(kernel, name, small)) for i, name in enumerate(names) if name != "_"]

    def unpack(machine: Machine, threads: Threads) -> None:
        values = read(machine, threads)
        for i, write in writes:
            shifted = values.view(RAW[SIZES[kind]]) >> RAW[SIZES[kind]](8 * size * i)
            write(machine, threads, shifted.astype(RAW[size]))

    return unpack


def _access(
    kernel: Kernel, operands: tuple[str, ...], root: str, space: str, vector: str | None, kind: str
) -> Run:
    data, where = operands if root == "ld" else operands[::-1]
    names, count, size = _names(data), int(vector or 1), SIZES[kind]
    assert len(names) == count, f"{len(names)} values"
    address = _address(kernel, where, space)
    if root == "ld":
        writes = [_writer(kernel, name, kind, wider=True) for name in names]
        load = {"global": _load_global, "param": _load_parameter, "shared": _load_shared}[space]
        dtype = DTYPES[kind]

        def run_load(machine: Machine, threads: Threads) -> None:
            values = load(machine, threads, address(machine, threads), size, count)
            for write, value in zip(writes, values, strict=True):
                write(machine, threads, value.view(dtype))

        return run_load
    reads = [_reader(kernel, name, kind, wider=True) for name in names]
    store = {"global": _store_global, "shared": _store_shared}[space]

    def run_store(machine: Machine, threads: Threads) -> None:
        values = [read(machine, threads).view(RAW[size]) for read in reads]
        store(machine, threads, address(machine, threads), size, values)

    return run_store


def _address(kernel: Kernel, text: str, space: str) -> Read:
    match = _ADDRESS.fullmatch(text)
    assert match is not None, f"address {text}"
    base, offset = match[1], int(match[2] or 0)
    named = base in kernel.parameters or base in kernel.shared
    is_register = base.startswith("%")
    assert is_register or named, f"address {text}"
    size = kernel.register(base)[1] if is_register else 8
    assert size == 8 or space == "shared", "an address of 32 bits"
    read = _reader(kernel, base, f"u{8 * size}")
    if not offset:
        return lambda machine, threads: read(machine, threads).astype(np.uint64)
    constant = np.uint64(offset & ((1 << 64) - 1))
    return lambda machine, threads: read(machine, threads).astype(np.uint64) + constant


def _load_global(machine: Machine, threads: Threads, at: Values, size: int, count: int) -> list[Values]:
    return machine.memory.load(np.atleast_1d(at), size, count)


def _store_global(machine: Machine, threads: Threads, at: Values, size: int, values: list[Values]) -> None:
    machine.memory.store(np.atleast_1d(at), size, values)


def _load_parameter(machine: Machine, threads: Threads, at: Values, size: int, count: int) -> list[Values]:
    at = at.astype(np.int64)
    if (
        (at < 0) | (at + size * count > machine.program.kernel.parameter_bytes) | (at % (size * count) != 0)
    ).any():
        raise Fault("access outside of the parameters, or misaligned")
    return [machine.parameters.view(RAW[size])[at // size + i] for i in range(count)]


def _load_shared(machine: Machine, threads: Threads, at: Values, size: int, count: int) -> list[Values]:
    return machine.shared.load(*_places(machine, threads, at), size, count)  # type: ignore[no-any-return]


def _store_shared(machine: Machine, threads: Threads, at: Values, size: int, values: list[Values]) -> None:
    machine.shared.store(*_places(machine, threads, at), size, values)


def _places(machine: Machine, threads: Threads, at: Values) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Threads, their blocks, their addresses."""
    if threads is None:
        threads = np.arange(machine.count)
    return threads, machine.block_of[threads], np.broadcast_to(at, threads.shape)


# shuffles


def _shuffle(kernel: Kernel, to: str, value: str, mask: str, clamp: str, members: str) -> Run:
    """`shfl.sync.bfly` between all lanes of a warp."""
    to, _, inside = to.partition("|")
    write = _writer(kernel, to, "b32")
    write_inside = _writer(kernel, inside, "pred") if inside else None
    read, *others = (_reader(kernel, text, "u32") for text in (value, mask, clamp, members))

    def exchange(machine: Machine, threads: Threads) -> None:
        masks, clamps, lanes = (other(machine, threads) for other in others)
        if (clamps != 31).any() or (lanes != EVERY_LANE).any():
            raise Fault("not between all lanes of a warp")
        values = read(machine, threads)
        own = np.arange(machine.count if threads is None else len(threads))
        source = own ^ np.asarray(masks).astype(np.intp)
        within = source // 32 == own // 32
        write(machine, threads, np.broadcast_to(values, own.shape)[np.where(within, source, own)])
        if write_inside is not None:
            write_inside(machine, threads, within)

    return exchange
