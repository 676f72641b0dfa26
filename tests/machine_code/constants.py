"""Reads of kernel parameters by an index, as ptxas writes them."""

from __future__ import annotations

import re
from collections.abc import Iterable

_GUARD = re.compile(r"@!?U?P\w+\s+")
_READ = re.compile(r"c\[0x0\]\[([^\]]*)\+-0x[0-9a-f]+\]")
_ADDING = re.compile(r"(?:U?IADD3|VIADD)\s.*, 0x10000\b")


def uncompensated(instructions: Iterable[str]) -> list[str]:
    """Indexed reads of constant bank 0 that go astray.

    Their offset has 16 bits and is signed, so that from 0x8000 on ptxas adds 0x10000 to the index. These are
    the reads where it did not.
    """
    found, compensated = [], set()
    for instruction in instructions:
        text = _GUARD.sub("", instruction.replace(".reuse", "")).strip()
        found += [instruction for index in _READ.findall(text) if index not in compensated]
        written = _written(text)
        if _ADDING.match(text):
            compensated |= written
        else:
            compensated -= written
    return found


def _written(text: str) -> set[str]:
    opcode, _, operands = text.partition(" ")
    first = re.match(r"(?:U?P\w+, )?(U?R)(\d+)\b", operands.strip())
    if not first or opcode.startswith(("ST", "BRA", "RET", "CALL")):
        return set()
    count = 4 if ".128" in opcode else 2 if re.search(r"\.64|\.WIDE|CS2R", opcode) else 1
    return {f"{first[1]}{int(first[2]) + i}" for i in range(count)}
