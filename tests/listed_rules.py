"""The rules that the compiled backends are built of, as csrc/rules.h lists them and CMake adds to it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

CSRC = Path(__file__).resolve().parent.parent / "csrc"


class Listed(NamedTuple):
    reduces: bool
    name: str
    struct: str
    header: str


def _listed() -> list[Listed]:
    lines = re.findall(
        r"^(REDUCING_)?RULE\((\w+), (\w+), (\w+)\)", (CSRC / "rules.h").read_text(), flags=re.MULTILINE
    )
    return [Listed(bool(reducing), *rest) for reducing, *rest in lines]


def is_of_an_optimizer(rule: Listed) -> bool:
    return " Uses uses " not in (CSRC / f"rules/{rule.header}.h").read_text()


ELEMENT_WISE = [rule for rule in _listed() if not rule.reduces]
LAYERED = [
    Listed(True, f"layer_{rule.name}", f"LayerAdapted{rule.struct}", f"layer_{rule.name}")
    for rule in ELEMENT_WISE
    if is_of_an_optimizer(rule)
]
REDUCING = [rule for rule in _listed() if rule.reduces] + LAYERED
