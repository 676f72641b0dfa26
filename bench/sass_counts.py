"""Instructions that CUDA kernels issue for an element, counted in machine code. Needs no GPU and no torch.

    python bench/sass_counts.py [library]

prints them for `KERNELS` in the built `danlu._cuda`. What is counted is one turn of the loop that moves the
most bytes, on the path that a warp takes in the middle of a tensor: calls, which only division and roots of
extreme numbers make, are left out; of two branches that move the same, the longer one counts.
"""

from __future__ import annotations

import atexit
import functools
import importlib.util
import itertools
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple


class Kernel(NamedTuple):
    """One kernel, and how many elements a thread has in a turn of its loop."""

    label: str
    pattern: str  # of its mangled name
    elements: int


# of parameter, gradient and states: all fp32; the first three bf16; the first two. A type that comes again is
# S and its number in a name
_F32 = r"FormatsIJNS_3F32E(S\w_)*EEE"
_BF16 = r"FormatsIJNS_4Bf16E(S\w_){2}(NS_3F32E(S\w_)*)?EEE"
_BF16_F32 = r"FormatsIJNS_4Bf16ES\w_NS_3F32E(S\w_)*EEE"
_FACTORED = r"AdafactorOfINS0_16FactoredVarianceELb0EEE"
KERNELS = [
    *(
        Kernel(
            f"{rule.lower()} {name}",
            rf"apply_kernelINS_4cuda\d+{rule}ENS_7{formats}.*LaunchListILi31744EE",
            8,
        )
        for rule in ("Lion", "AdamW")
        for name, formats in (("f32", _F32), ("bf16", _BF16))
    ),
    *(
        Kernel(f"lamb {kernel} {name}", rf"{kernel}_kernelINS0_4LambENS_7{formats}", 8)
        for kernel in ("reduce_norms", "apply")
        for name, formats in (("f32", _F32), ("bf16", _BF16))
    ),
    Kernel("adafactor reduce_gradient f32", rf"reduce_gradient_kernelINS0_\d+{_FACTORED}fEE", 64),
    Kernel("adafactor reduce_gradient bf16", rf"reduce_gradient_kernelINS0_\d+{_FACTORED}NS_4bf16EEE", 64),
    *(
        Kernel(f"adafactor {kernel} {name}", rf"{kernel}_kernelINS0_\d+{_FACTORED}NS_7{formats}", 8)
        for kernel in ("reduce_norms", "apply")
        for name, formats in (("f32", _F32), ("bf16", _BF16_F32))
    ),
]


class Instruction(NamedTuple):
    address: int
    predicate: str  # as @P0 or @!P0; empty: always executed
    opcode: str
    operands: str

    @property
    def bytes(self) -> int:
        """That it moves to or from global memory."""
        if not self.opcode.startswith(("LDG", "STG")):
            return 0
        bits = re.search(r"\.(?:[US])?(8|16|64|128)(?:\.|$)", self.opcode)
        return int(bits[1]) // 8 if bits else 4

    @property
    def target(self) -> int | None:
        found = re.search(r"0x([0-9a-f]+)\s*$", self.operands) if self.opcode.startswith("BRA") else None
        return int(found[1], 16) if found else None


@dataclass
class _Block:
    instructions: list[Instruction] = field(default_factory=list)
    successors: list[int] = field(default_factory=list)  # addresses of blocks

    def bytes(self, *, unconditional: bool = False) -> int:
        return sum(i.bytes for i in self.instructions if not (unconditional and i.predicate))

    @property
    def calls(self) -> bool:
        return any(instruction.opcode.startswith("CALL") for instruction in self.instructions)


class _Path(NamedTuple):
    """Ordered by how hot it is."""

    bytes: int
    most_bytes: int  # of one block: at the edge of a tensor each load is behind a condition of its own
    count: int
    blocks: tuple[int, ...]


def listed(library: Path, pattern: str, architecture: int = 90) -> dict[str, list[Instruction]]:
    """The kernels whose mangled names have a pattern in them, of a library or a cubin."""
    found: dict[str, list[Instruction]] = {}
    for file in _cubins(library, architecture):
        names = set(re.findall(rb"\.text\.(\w+)", file.read_bytes()))
        wanted = sorted(name.decode() for name in names if re.search(pattern, name.decode()))
        if wanted:
            found.update(parsed(_run("cuobjdump", "-sass", "-fun", ",".join(wanted), file)))
    return found


def resources(library: Path, architecture: int = 90) -> dict[str, tuple[int, int]]:
    """Registers of a thread and bytes of shared memory of a block, of each kernel by its mangled name."""
    pattern = r"Function (\S+):\s+REG:(\d+) STACK:\d+ SHARED:(\d+)"
    found = {}
    for file in _cubins(library, architecture):
        for name, registers, shared in re.findall(pattern, _run("cuobjdump", "-res-usage", file)):
            found[name] = int(registers), int(shared)
    return found


def compiler(library: Path, architecture: int = 90) -> str:
    """The release that assembled the kernels, as 13.0."""
    for file in _cubins(library, architecture):
        if release := re.search(rb"Cuda compilation tools, release (\d+\.\d+)", file.read_bytes()):
            return release[1].decode()
    raise SystemExit(f"{library.name} does not say which release assembled it")


@functools.cache
def _cubins(library: Path, architecture: int) -> list[Path]:
    """The object files inside a library, extracted for as long as this process runs."""
    if library.suffix == ".cubin":
        return [library.resolve()]
    folder = Path(tempfile.mkdtemp(prefix="danlu-sass-"))
    atexit.register(shutil.rmtree, folder)
    _run("cuobjdump", "-xelf", f"sm_{architecture}", library.resolve(), folder=folder)
    return sorted(folder.glob("*.cubin"))


def parsed(text: str) -> dict[str, list[Instruction]]:
    """What `cuobjdump -sass` prints."""
    functions: dict[str, list[Instruction]] = {}
    current: list[Instruction] = []
    for line in text.splitlines():
        if name := re.search(r"Function : (\S+)", line):
            current = functions.setdefault(name[1], [])
        elif found := re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z]\S*)\s*(.*?)\s*;", line):
            current.append(Instruction(int(found[1], 16), found[2] or "", found[3], found[4]))
    return functions


def hot_turn(instructions: Iterable[Instruction]) -> Counter[str]:
    """How often one turn of the hot loop has each opcode, without its modifiers."""
    return Counter(instruction.opcode.split(".")[0] for instruction in hot_instructions(instructions))


def hot_instructions(instructions: Iterable[Instruction]) -> list[Instruction]:
    """One turn of the hot loop."""
    blocks = _blocks(list(instructions))
    turns = [
        path
        for end, block in blocks.items()
        for start in block.successors
        if start <= end and (path := _turn(blocks, start, end))
    ]
    hottest = max(turns)
    return [instruction for at in hottest.blocks for instruction in blocks[at].instructions]


def _blocks(instructions: list[Instruction]) -> dict[int, _Block]:
    """Basic blocks by the addresses at which they start."""
    ends = ("BRA", "EXIT", "RET", "BRX", "JMP")
    starts = {instructions[0].address}
    for before, after in itertools.pairwise(instructions):
        if before.opcode.startswith(ends):
            starts |= {after.address} | ({before.target} if before.target is not None else set())
    blocks: dict[int, _Block] = {}
    for i, instruction in enumerate(instructions):
        if instruction.address in starts:
            block = blocks[instruction.address] = _Block()
        block.instructions.append(instruction)
        following = instructions[i + 1].address if i + 1 < len(instructions) else None
        if instruction.target is not None:
            block.successors.append(instruction.target)
        # a branch may have its condition among its operands
        goes_on = bool(instruction.predicate) or "," in instruction.operands
        if following in starts and (not instruction.opcode.startswith(ends) or goes_on):
            block.successors.append(following)  # type: ignore[arg-type]
    return blocks


def _turn(blocks: dict[int, _Block], start: int, end: int) -> _Path | None:
    """The hottest path from the first block of a loop to the last one, without calls and inner turns."""
    best: dict[int, _Path | None] = {}

    def from_block(at: int) -> _Path | None:
        if at not in best:
            block = blocks[at]
            mine = (block.bytes(), block.bytes(unconditional=True), len(block.instructions))
            paths = []
            if at == end:
                paths = [_Path(*mine, (at,))]
            elif not block.calls:
                for following in block.successors:
                    rest = from_block(following) if following > at else None
                    if rest:
                        moved, most = mine[0] + rest.bytes, max(mine[1], rest.most_bytes)
                        paths.append(_Path(moved, most, mine[2] + rest.count, (at, *rest.blocks)))
            best[at] = max(paths, default=None)
        return best[at]

    return from_block(start)


def _run(tool: str, *options: str | Path, folder: Path | None = None) -> str:
    """One of NVIDIA's tools inside the triton wheel."""
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        raise SystemExit("the machine code is read with tools of the triton package, which is not installed")
    path = Path(spec.origin).parent / "backends/nvidia/bin" / tool
    return subprocess.run([path, *options], capture_output=True, text=True, check=True, cwd=folder).stdout


def built() -> Path:
    """The library of `danlu._cuda`."""
    found = sorted((Path(__file__).resolve().parent.parent / "python/danlu").glob("_cuda.*.so"))
    if not found:
        raise SystemExit("danlu._cuda is not built")
    return found[0]


def main() -> None:
    library = Path(sys.argv[1]) if len(sys.argv) > 1 else built()
    for kernel in KERNELS:
        for instructions in listed(library, kernel.pattern).values():
            turn = hot_turn(instructions)
            opcodes = ", ".join(f"{name} {n}" for name, n in turn.most_common())
            print(f"{kernel.label:24}{turn.total() / kernel.elements:6.2f}  {opcodes}")


if __name__ == "__main__":
    main()
