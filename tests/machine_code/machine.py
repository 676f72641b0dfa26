"""Executes a kernel's PTX: the threads of many blocks together, as vectors.

Threads that are at the same instruction are a group. The group that is furthest behind goes on until it
meets the next one, so that branches come together again. A shuffle waits for the whole warp, a barrier for
the whole block. Registers and shared memory start as garbage.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .memory import RAW, Fault, Memory
from .program import Program, Step

THREADS_AT_ONCE = 1 << 14
STEPS = 1_000_000
WARP = 32
Threads = Any  # sorted numbers of those in a group, or None for all
GARBAGE = 0xDEADBEEFDEADBEEF
NOBODY = np.zeros(0, np.intp)


def launch(program: Program, parameters: bytes, blocks: int, memory: Memory, steps: int = STEPS) -> None:
    """Runs a grid. steps: instructions of a batch of blocks after which it is taken to run for ever."""
    if len(parameters) != program.kernel.parameter_bytes:
        raise Fault(
            f"{program.kernel.name} takes {program.kernel.parameter_bytes} bytes of parameters, "
            f"a launch gave {len(parameters)}"
        )
    batch = max(1, THREADS_AT_ONCE // program.kernel.threads)
    with np.errstate(all="ignore"):
        for first in range(0, blocks, batch):
            Machine(program, parameters, range(first, min(first + batch, blocks)), blocks, memory).run(steps)


class Machine:
    """Some blocks of a launch."""

    def __init__(self, program: Program, parameters: bytes, blocks: range, grid: int, memory: Memory) -> None:
        self.program, self.memory = program, memory
        threads = program.kernel.threads
        self.count = threads * len(blocks)
        self.block_of = np.repeat(np.arange(len(blocks)), threads)
        self.parameters = np.frombuffer(parameters + bytes(-len(parameters) % 8), np.uint8)
        thread = np.tile(np.arange(threads, dtype=np.uint32), len(blocks))
        self.special = {
            "%tid.x": thread,
            "%ctaid.x": np.repeat(np.arange(blocks.start, blocks.stop, dtype=np.uint32), threads),
            "%ntid.x": np.uint32(threads),
            "%nctaid.x": np.uint32(grid),
        }
        garbage = {size: np.full(self.count, GARBAGE & (1 << 8 * size) - 1, raw) for size, raw in RAW.items()}
        garbage[0] = np.ones(self.count, np.bool_)
        for values in garbage.values():
            values.flags.writeable = False  # all registers share them
        self.registers = [garbage[size] for size in program.register_sizes]
        self.shared = SharedMemory(program.kernel.shared_bytes, len(blocks))

    def run(self, steps: int) -> None:
        groups: dict[int, Threads] = {0: None}
        waiting: dict[int, Threads] = {}  # for others of their warp or block
        while groups:
            at = min(groups)
            threads = groups.pop(at)
            steps -= self._advance(at, threads, groups, waiting, steps)
        if waiting:
            at = min(waiting)
            raise self._fault(at, waiting[at], "the others of the warp or block are elsewhere")

    def _advance(
        self, at: int, threads: Threads, groups: dict[int, Threads], waiting: dict[int, Threads], steps: int
    ) -> int:
        """Runs a group until it meets another, parts or ends. Returns how many instructions that were."""
        code, registers = self.program.steps, self.registers
        next_group = min(groups, default=len(code) + 1)
        for done in range(steps):
            if at >= next_group:
                self._join(groups, at, threads)
                return done + 1
            if at == len(code):
                raise self._fault(at - 1, threads, "runs past its end")
            step = code[at] or self.program.step(at)
            taken, others = threads, NOBODY
            if step.predicate is not None:
                taken, others = self._parted(threads, registers[step.predicate], step.negated)
            if step.run is not None:
                if taken is None or len(taken):
                    try:
                        step.run(self, taken)
                    except Fault as fault:
                        raise self._fault(at, taken, str(fault)) from None
                at += 1
            elif step.synchronizes is not None:
                if step.predicate is not None:
                    raise self._fault(at, threads, "waits under a predicate")
                threads = self._synchronized(step, at, threads, waiting)
                if threads is not None and not len(threads):
                    return done + 1
                at += 1
            elif taken is not None and not len(taken):
                at += 1
            elif others is None or len(others):
                self._join(groups, at + 1, others)
                if step.target is not None:
                    self._join(groups, step.target, taken)
                return done + 1
            elif step.target is None:
                return done + 1
            else:
                at = step.target
        raise self._fault(at, threads, "too many instructions")

    def _parted(self, threads: Threads, predicate: np.ndarray, negated: bool) -> tuple[Threads, Threads]:
        """Those for which it holds and the others."""
        holds = predicate if threads is None else predicate[threads]
        if negated:
            holds = ~holds
        number = np.count_nonzero(holds)
        if number == len(holds):
            return threads, NOBODY
        if number == 0:
            return NOBODY, threads
        if threads is None:
            return np.flatnonzero(holds), np.flatnonzero(~holds)
        return threads[holds], threads[~holds]

    def _synchronized(self, step: Step, at: int, threads: Threads, waiting: dict[int, Threads]) -> Threads:
        """The threads that may go on, whose warps or blocks are complete; the others wait."""
        if at in waiting:
            threads = self._merged(waiting.pop(at), threads)
        if threads is not None:
            size = WARP if step.synchronizes == "warp" else self.program.kernel.threads
            complete = np.bincount(threads // size, minlength=self.count // size)[threads // size] == size
            if not complete.all():
                waiting[at] = threads[~complete]
                threads = threads[complete]
        if step.exchange is not None and (threads is None or len(threads)):
            try:
                step.exchange(self, threads)
            except Fault as fault:
                raise self._fault(at, threads, str(fault)) from None
        if step.synchronizes == "block":
            self.shared.pass_barrier(self.block_of if threads is None else self.block_of[threads])
        return threads

    def _join(self, groups: dict[int, Threads], at: int, threads: Threads) -> None:
        groups[at] = self._merged(groups[at], threads) if at in groups else threads

    def _merged(self, a: np.ndarray, b: np.ndarray) -> Threads:
        return None if len(a) + len(b) == self.count else np.sort(np.concatenate([a, b]))

    def _fault(self, at: int, threads: Threads, what: str) -> Fault:
        first = 0 if threads is None or not len(threads) else int(threads[0])
        block, thread = (int(self.special[name][first]) for name in ("%ctaid.x", "%tid.x"))
        where = f"instruction {at}, block {block}, thread {thread}"
        return Fault(f"{self.program.kernel.name}, {where}: {self.program.kernel.code[at]} {what}")


class SharedMemory:
    """Of some blocks. Two warps may meet in a value only with a barrier between them."""

    def __init__(self, size: int, blocks: int) -> None:
        self.size = size
        self._bytes = np.full(size * blocks, 0x7F, np.uint8)
        words = size * blocks // 4
        self._barriers = np.zeros(blocks, np.int32)
        self._writer, self._written = np.full(words, -1), np.full(words, -1, np.int32)
        self._reader, self._read = np.full(words, -1), np.full(words, -1, np.int32)

    def load(self, threads: np.ndarray, block: np.ndarray, at: np.ndarray, itemsize: int, count: int) -> Any:
        first = self._checked(block, at, itemsize, count)
        for word in self._words(first, itemsize, count):
            race = (self._written[word] == self._barriers[block]) & (self._writer[word] != threads // WARP)
            if race.any():
                raise Fault("reads what another warp writes")
            alone = (self._read[word] != self._barriers[block]) | (self._reader[word] == threads // WARP)
            self._reader[word] = np.where(alone, threads // WARP, -2)
            self._read[word] = self._barriers[block]
        return [self._bytes.view(RAW[itemsize])[first // itemsize + i] for i in range(count)]

    def store(
        self, threads: np.ndarray, block: np.ndarray, at: np.ndarray, itemsize: int, values: list[Any]
    ) -> None:
        first = self._checked(block, at, itemsize, len(values))
        now, warp = self._barriers[block], threads // WARP
        stored = self._bytes.view(RAW[itemsize])
        places = [first // itemsize + i for i in range(len(values))]

        def differs() -> np.ndarray:
            found = [stored[place] != value for place, value in zip(places, values, strict=True)]
            return np.logical_or.reduce(found)

        for word in self._words(first, itemsize, len(values)):
            if ((self._read[word] == now) & (self._reader[word] != warp)).any():
                raise Fault("writes what another warp reads")
            if ((self._written[word] == now) & (self._writer[word] != warp) & differs()).any():
                raise Fault("writes what another warp writes")
            self._writer[word], self._written[word] = warp, now
        for place, value in zip(places, values, strict=True):
            stored[place] = value
        if differs().any():  # several write the same number where a layout repeats it
            raise Fault("writes what another thread writes")

    def pass_barrier(self, blocks: np.ndarray) -> None:
        self._barriers[np.unique(blocks)] += 1

    def _checked(self, block: np.ndarray, at: np.ndarray, itemsize: int, count: int) -> np.ndarray:
        at = at.astype(np.int64)
        if ((at < 0) | (at + itemsize * count > self.size)).any():
            raise Fault(f"access outside of {self.size} bytes of shared memory")
        if (at % (itemsize * count)).any():
            raise Fault("misaligned access of shared memory")
        return block * self.size + at

    def _words(self, first: np.ndarray, itemsize: int, count: int) -> list[np.ndarray]:
        return [(first + i) // 4 for i in range(0, itemsize * count, 4)]
