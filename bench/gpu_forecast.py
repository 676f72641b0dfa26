"""What the CUDA kernels should reach on an H100 and an H200, from their machine code. Needs no GPU.

    python bench/gpu_forecast.py [--measured bench/results/DEVICE/gpu.json]

writes docs/gpu_forecast.md. For each kernel: registers and the blocks of a multiprocessor that follow from
them; bytes that its threads have asked for before they use the first; instructions for an element (as
bench/sass_counts.py counts them); and the time that memory, instructions and latency would take, each alone.
The longest of the three is the bound.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import results_file
import sass_counts

PAGE = Path(__file__).resolve().parent.parent / "docs/gpu_forecast.md"

# of a multiprocessor with compute capability 9.0
REGISTERS, THREADS, SHARED_KB, WARPS_PER_CLOCK = 65536, 2048, 227, 4
THREADS_OF_BLOCK, WARP = 256, 32
# assumptions; the page says so
COPIED = 0.92  # of the memory's speed on paper that a copy reaches
LATENCY = 700e-9  # seconds from a read to its use while memory is busy
ISSUED = 0.85  # of the instructions that a multiprocessor could issue
NOT_MEASURED = "not measured yet"


INTRODUCTION = f"""# Forecast for GPUs

**This is a forecast.** danlu has not run on a GPU yet. `python bench/gpu_forecast.py` makes this page from
the machine code for compute capability 9.0 (nvcc {{compiler}}); `--measured` puts a run's figures beside it.

Three times are worked out for each kernel, each as if it were alone. The longest is the bound: memory, as
long as the table has the other two below 100% of its time. A share is of the ceiling, what an in-place copy
reaches.

| time of | what it is |
|---|---|
| memory | bytes of an element, at {COPIED:.0%} of the data sheet's speed |
| instructions | those of the hot loop for an element, at {ISSUED:.0%} of four warps a clock |
| latency | what the resident threads ask for at once, every {LATENCY * 1e9:.0f} ns |

Bytes are those of memory. Factors of rows and columns come from the caches, and so may a gradient that a
pass reads again: such a pass may be faster than memory allows. Launches, the beginning of blocks and the last
of them, when not all multiprocessors have one, are left out.

"""


@dataclass(frozen=True)
class Card:
    """A GPU by its data sheet."""

    name: str
    bytes_per_second: float
    multiprocessors: int
    clock: float  # Hz

    @property
    def ceiling(self) -> float:
        """Bytes a second of one multiprocessor's part of a copy."""
        return COPIED * self.bytes_per_second / self.multiprocessors


CARDS = (Card("H100 SXM", 3.35e12, 132, 1.755e9), Card("H200", 4.8e12, 132, 1.755e9))


@dataclass(frozen=True)
class Pass:
    """A kernel of a step. memory: bytes of an element that it moves from and to memory."""

    label: str  # as in `sass_counts.KERNELS`
    memory: int
    arrays: str


@dataclass(frozen=True)
class Step:
    """The passes over all elements that an optimizer makes; contender: its name in gpu.json."""

    name: str
    contender: str
    passes: tuple[Pass, ...]


def _reads(label: str, size: int, arrays: int) -> Pass:
    return Pass(label, size * arrays, f"reads {arrays}")


STEPS = (
    Step("Lion fp32", "lion", (Pass("lion f32", 20, "reads 3, writes 2"),)),
    Step("Lion bf16", "lion-bf16", (Pass("lion bf16", 10, "reads 3, writes 2"),)),
    Step("AdamW fp32", "adamw", (Pass("adamw f32", 28, "reads 4, writes 3"),)),
    Step("AdamW bf16, second moment fp32", "adamw-bf16", (Pass("adamw bf16", 18, "reads 4, writes 3"),)),
    Step(
        "LAMB fp32",
        "lamb",
        (_reads("lamb reduce_norms f32", 4, 4), Pass("lamb apply f32", 28, "reads 4, writes 3")),
    ),
    Step(
        "LAMB bf16, second moment fp32",
        "lamb-bf16",
        (Pass("lamb reduce_norms bf16", 10, "reads 4"), Pass("lamb apply bf16", 18, "reads 4, writes 3")),
    ),
    Step(
        "Adafactor fp32",
        "adafactor",
        (
            _reads("adafactor reduce_gradient f32", 4, 1),
            _reads("adafactor reduce_norms f32", 4, 2),
            Pass("adafactor apply f32", 12, "reads 2, writes 1"),
        ),
    ),
    Step(
        "Adafactor bf16",
        "adafactor-bf16",
        (
            _reads("adafactor reduce_gradient bf16", 2, 1),
            _reads("adafactor reduce_norms bf16", 2, 2),
            Pass("adafactor apply bf16", 6, "reads 2, writes 1"),
        ),
    ),
)


@dataclass(frozen=True)
class Found:
    """What the machine code of a kernel says."""

    registers: int
    shared: int  # bytes of a block
    instructions: float  # of an element
    loaded: int  # bytes that a thread loads in a turn

    @property
    def blocks(self) -> int:
        """That a multiprocessor holds; registers are given to warps 256 at a time."""
        of_warp = -(-self.registers * WARP // 256) * 256
        by_registers = REGISTERS // (of_warp * THREADS_OF_BLOCK // WARP)
        by_shared = SHARED_KB * 1024 // (self.shared + 1024)  # a KB of each block is the system's
        return min(by_registers, by_shared, THREADS // THREADS_OF_BLOCK)

    @property
    def in_flight(self) -> int:
        """Bytes of a multiprocessor."""
        return self.blocks * THREADS_OF_BLOCK * self.loaded


@dataclass(frozen=True)
class Forecast:
    """Seconds that each alone would take for an element on one multiprocessor."""

    memory: float
    issue: float
    latency: float

    @classmethod
    def of(cls, card: Card, found: Found, memory: int) -> Forecast:
        instructions = found.instructions / (ISSUED * WARPS_PER_CLOCK * WARP * card.clock)
        waiting = memory * LATENCY / found.in_flight
        return cls(memory / card.ceiling, instructions, waiting)

    @property
    def seconds(self) -> float:
        return max(self.memory, self.issue, self.latency)

    @property
    def share(self) -> float:
        """Of the ceiling."""
        return self.memory / self.seconds


def read(library: Path) -> dict[str, Found]:
    """The kernels of `sass_counts.KERNELS` by their labels."""
    usage = sass_counts.resources(library)
    found = {}
    for kernel in sass_counts.KERNELS:
        ((name, instructions),) = sass_counts.listed(library, kernel.pattern).items()
        turn = sass_counts.hot_instructions(instructions)
        loaded = sum(i.bytes for i in turn if i.opcode.startswith("LDG"))
        registers, shared = usage[name]
        found[kernel.label] = Found(registers, shared, len(turn) / kernel.elements, loaded)
    return found


def page(found: dict[str, Found], compiler: str, measured: dict[str, float] | None = None) -> str:
    return "\n".join(_lines(found, compiler, measured or {})) + "\n"


def _lines(found: dict[str, Found], compiler: str, measured: dict[str, float]) -> Iterator[str]:
    yield from _introduction(compiler)
    yield from ("", "## Kernels", "")
    head = ["kernel", "registers", "blocks", "KB in flight", "instructions", "bytes"]
    for card in CARDS:
        head += [f"{card.name}: instructions", "latency", "share"]
    yield _row(head)
    yield _row(["---"] * len(head))
    for step in STEPS:
        for one in step.passes:
            code = found[one.label]
            cells = [
                one.label,
                str(code.registers),
                str(code.blocks),
                f"{code.in_flight / 1024:.0f}",
                f"{code.instructions:.1f}",
                f"{one.memory} ({one.arrays})",
            ]
            for card in CARDS:
                forecast = Forecast.of(card, code, one.memory)
                of_memory = (forecast.issue / forecast.memory, forecast.latency / forecast.memory)
                cells += [f"{part:.0%}" for part in (*of_memory, forecast.share)]
            yield _row(cells)
    yield from ("", "## Steps", "")
    head = ["optimizer", "bytes", *(f"{card.name}, forecast" for card in CARDS), "measured"]
    yield _row(head)
    yield _row(["---"] * len(head))
    for step in STEPS:
        cells = [step.name, str(sum(one.memory for one in step.passes))]
        for card in CARDS:
            each = [Forecast.of(card, found[one.label], one.memory) for one in step.passes]
            cells.append(f"{sum(f.memory for f in each) / sum(f.seconds for f in each):.0%}")
        share = measured.get(step.contender)
        yield _row([*cells, NOT_MEASURED if share is None else f"{share:.0%}"])


def _introduction(compiler: str) -> Iterator[str]:
    yield from INTRODUCTION.format(compiler=compiler).splitlines()
    for card in CARDS:
        yield (
            f"- {card.name}: {card.bytes_per_second / 1e12:g} TB/s, {card.multiprocessors} multiprocessors, "
            f"{card.clock / 1e9:g} GHz"
        )


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def shares(results: dict[str, Any]) -> dict[str, float]:
    """Of the ceiling, by the kernels' own times, for each contender that a run on a GPU has measured."""
    found = {}
    for stage in results["stages"].values():
        for workload in _workloads(stage.get("result")):
            for row in workload["contenders"]:
                share = row.get("kernel_share_of_ceiling") or row.get("share_of_ceiling")
                if share:
                    found.setdefault(row["name"], share["median"])
    return found


def _workloads(result: Any) -> Iterator[dict[str, Any]]:
    if isinstance(result, dict) and "contenders" in result:
        yield result
    elif isinstance(result, dict | list):
        for value in result.values() if isinstance(result, dict) else result:
            yield from _workloads(value)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--measured", type=Path, help="gpu.json of a run")
    options = parser.parse_args(arguments)
    measured = shares(results_file.read(options.measured)) if options.measured else None
    library = sass_counts.built()
    PAGE.write_text(page(read(library), sass_counts.compiler(library), measured))


if __name__ == "__main__":
    main()
