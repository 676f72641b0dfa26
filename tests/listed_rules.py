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


def type_of(rule: Listed) -> str:
    """The struct, or what stands for it, as compilers name it inside its namespace."""
    if rule.name.startswith("layer_"):
        return f"LayerAdapted<{rule.struct.removeprefix('LayerAdapted')}>"
    alias = re.search(rf"using {rule.struct} = (.*);", (CSRC / f"rules/{rule.header}.h").read_text())
    if alias is None:
        return rule.struct
    (values,) = re.findall(r"enum class Along \{ (.*) \}", (CSRC / "common/rule.h").read_text())
    names = {f"Along::{name}": f"(Along){i}" for i, name in enumerate(values.split(", "))}
    return re.sub(r"Along::\w+", lambda found: names[found[0]], alias[1])


ELEMENT_WISE = [rule for rule in _listed() if not rule.reduces]
LAYERED = [
    Listed(True, f"layer_{rule.name}", f"LayerAdapted{rule.struct}", f"layer_{rule.name}")
    for rule in ELEMENT_WISE
    if is_of_an_optimizer(rule)
]
REDUCING = [rule for rule in _listed() if rule.reduces] + LAYERED
