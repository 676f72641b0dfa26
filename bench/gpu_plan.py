"""Which stage of `bench/gpu.py` comes next, and which are left out, by what the others found.

In order of value, but
- wrong bits in both engines: nothing more is measured; in one, the other is;
- where rules that reduce are right only if their passes do not start early, that is turned off;
- an engine that makes CUDA unusable (an illegal address) is not measured: memcheck and the tests come next;
- AdamW, AdaX or Lion by CUDA below 85% of the bandwidth ceiling: shapes and ncu come next;
- a stage with less time left than it needs at least is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import gpu_smoke
from gpu_run import Stage

ENGINES = ("cuda", "triton")
SHARE = 0.85  # of the ceiling

# what a process that died of it says
UNUSABLE = ("illegal memory access", "misaligned address", "unspecified launch failure")

Stages = dict[str, Any]  # entries of gpu.json


class Planned(NamedTuple):
    """A stage, and what it takes."""

    run: Stage
    least: float  # seconds without which it is not begun
    most: float  # seconds after which it is interrupted
    engine: str = ""  # without which it has nothing to measure; "any" for one of them; empty: runs always


def following(planned: dict[str, Planned], stages: Stages) -> str | None:
    """The stage that comes next."""
    for name in (*urgent(stages), *planned):
        if name in planned and name not in stages:
            return name
    return None


def urgent(stages: Stages) -> Iterator[str]:
    """What comes before everything else once the first checks are done."""
    if "smoke" not in stages:
        return
    if any("unusable" in entry for entry in stages.values()) or "unusable" in faults(stages).values():
        yield from ("memcheck", "tests")
    if slow(stages):
        yield from ("shapes", "ncu")


def left_out(name: str, stage: Planned, stages: Stages, left: float) -> str | None:
    """Why a stage is not begun with so many seconds left; None if it is."""
    found = faults(stages)
    if stopped(stages) and not (name == "memcheck" and "unusable" in found.values()):
        return f"nothing is measured: {', '.join(f'{engine}: {what}' for engine, what in found.items())}"
    if stage.engine in found:
        return f"{stage.engine}: {found[stage.engine]}"
    if left < stage.least:
        return f"{max(left, 0):.0f} s are left, it needs {stage.least:.0f} s"
    return None


def stopped(stages: Stages) -> bool:
    """Whether no engine is right."""
    return len(faults(stages)) == len(ENGINES)


def faults(stages: Stages) -> dict[str, str]:
    """Engines that must not be measured, and why: "wrong bits", "unusable" or "failed"."""
    if "smoke" not in stages:
        return {}
    if "result" not in stages["smoke"]:
        return dict.fromkeys(ENGINES, "failed")
    smoke = stages["smoke"]["result"]
    return {engine: smoke[engine]["fault"] for engine in ENGINES if smoke[engine]["fault"]}


def fault(status: int | None, checks: Sequence[dict[str, Any]], said: str) -> str | None:
    """Of an engine, by what bench/gpu_smoke.py left: exit status, checks, and what else it printed."""
    if status == gpu_smoke.UNUSABLE or (status != 0 and any(sign in said for sign in UNUSABLE)):
        return "unusable"
    if overlap_is_wrong(checks):
        return None
    if any(check.get("differences") for check in checks):
        return "wrong bits"
    return None if status == 0 and checks else "failed"


def overlap_is_wrong(checks: Sequence[dict[str, Any]]) -> bool:
    """Whether all that was wrong is right where passes do not start while the one before ends."""
    wrong = [check for check in checks if not check["right"]]
    return bool(wrong) and all(check.get("right_without_overlap") for check in wrong)


def slow(stages: Stages) -> list[str]:
    """danlu's contenders by CUDA whose first rounds are below the ceiling by more than they may be."""
    rows = stages.get("first", {}).get("result", {}).get("contenders", [])
    ours = [row for row in rows if not row["name"].startswith("torch") and not row["name"].endswith("triton")]
    return [r["name"] for r in ours if "failed" not in r and r["share_of_ceiling"]["median"] < SHARE]
