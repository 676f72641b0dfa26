"""What rules that reduce, and the norm of all gradients, must come to on a GPU, and whether they do."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from contenders import REDUCING_ON_CUDA

TIMES_TORCH = 5.0  # Adafactor's speed by that of torch's foreach one
# Adafactor's time by that of so many bytes a parameter in place, as if the gradient were read twice from
# memory and once from the cache; what its passes read and write is more, see docs/gpu_reductions.md
ADAFACTOR_BYTES = {4: 20, 2: 10}
ADAFACTOR_TIME = 1.35
LAMB_SHARE = 0.85  # of the bandwidth ceiling, for LAMB's own bytes
NORM_SHARE = 0.9  # of the speed of reading

Result = dict[str, Any]


def of_steps(measured: Result) -> dict[str, list[Result]]:
    """Of a measurement by `rounds.measure`, by contender; what was not measured has none."""
    found: dict[str, list[Result]] = {}
    for name, one in (*_times_torch(measured), *_time_of_adafactor(measured), *_share_of_lamb(measured)):
        found.setdefault(name, []).append(one)
    return found


def bar(
    what: str, figure: dict[str, float], *, least: float | None = None, most: float | None = None
) -> Result:
    """One figure, and whether its median comes to what is asked."""
    reached = (least is None or figure["median"] >= least) and (most is None or figure["median"] <= most)
    return {"what": what, "figure": figure, "least": least, "most": most, "reached": reached}


def text(one: Result) -> str:
    """For a reader: the figure with quartiles beside what is asked."""
    figure = one["figure"]
    asked = f">= {one['least']:g}" if one["least"] is not None else f"<= {one['most']:g}"
    outcome = "reached" if one["reached"] else "NOT REACHED"
    spread = f"{figure['median']:.2f} ({figure['low']:.2f}-{figure['high']:.2f})"
    return f"{spread} {one['what']} {asked}: {outcome}"


def _times_torch(measured: Result) -> Iterator[tuple[str, Result]]:
    for pair in measured["pairs"]:
        name, than = pair["name"], pair["than"]
        if name.startswith("adafactor") and than.startswith("torch-adafactor-foreach"):
            yield name, bar("times torch's speed", pair["ratio"], least=TIMES_TORCH)


def _time_of_adafactor(measured: Result) -> Iterator[tuple[str, Result]]:
    for row, contender in _rows(measured, "adafactor"):
        asked = ADAFACTOR_BYTES[contender.dtype.itemsize]
        more, share = contender.bytes / asked, row["share_of_ceiling"]
        times = {"median": more / share["median"], "low": more / share["high"], "high": more / share["low"]}
        what = f"times {asked} B/param in place"
        yield row["name"], bar(what, times, most=ADAFACTOR_TIME)


def _share_of_lamb(measured: Result) -> Iterator[tuple[str, Result]]:
    for row, contender in _rows(measured, "lamb"):
        what = f"of the ceiling for {contender.bytes} B/param"
        yield row["name"], bar(what, row["share_of_ceiling"], least=LAMB_SHARE)


def _rows(measured: Result, rule: str) -> Iterator[tuple[Result, Any]]:
    """Those of a rule that were measured, with their contenders."""
    contenders = {c.id: c for c in REDUCING_ON_CUDA}
    for row in measured["contenders"]:
        if "failed" not in row and row["name"].startswith(rule) and row["name"] in contenders:
            yield row, contenders[row["name"]]
