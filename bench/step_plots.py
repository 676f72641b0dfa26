"""Plots of step times and of memory, from a results file; `python bench/step_plots.py FILE.json` redraws.

Beside the file lie NAME.png (the first workload), NAME_memory.png (its memory) and NAME_others.png.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import results_file
from contenders import BASELINE, ON_CPU, ON_CUDA, Contender

Row = dict[str, Any]
CONTENDERS = {c.id: c for c in (*ON_CUDA, *ON_CPU)}
OF_DANLU, OF_OTHERS = "#c8102e", "#9aa5b1"
PARTS = {"weights": "#5b6770", "gradients": "#aab4bd", "optimizer state": "#3b6ea5"}
ROW_HEIGHT = 0.27  # inches


def draw(results: dict[str, Any], path: Path) -> list[str]:
    """All plots of a results file; `path` is that of the first. Returns their names."""
    first, *others = results["workloads"]
    drawn = [path, path.with_stem(f"{path.stem}_memory")]
    times([first], results["environment"], path)
    memory(first, results["environment"], drawn[1])
    if others:
        drawn.append(path.with_stem(f"{path.stem}_others"))
        times(others, results["environment"], drawn[2])
    return [p.name for p in drawn]


def times(workloads: Sequence[dict[str, Any]], environment: dict[str, Any], path: Path) -> None:
    """A panel for each workload: step times divided by the baseline's, in ms where that was not measured.

    The axis is linear, the fastest comes first. Of several ways to run a rival the fastest is shown. A thin
    line shows the quartiles, a tick the time of an in-place loop over the same bytes.
    """
    pyplot = _pyplot()
    shown = [fastest(measured["contenders"]) for measured in workloads]
    heights = [1.2 + ROW_HEIGHT * max(1, len(rows)) for rows in shown]
    figure, panels = pyplot.subplots(
        len(shown),
        1,
        squeeze=False,
        figsize=(7.5, sum(heights)),
        layout="constrained",
        height_ratios=heights,
    )
    for panel, measured, rows in zip(panels[:, 0], workloads, shown, strict=True):
        if rows:
            _panel_of_times(panel, rows)
        panel.set_title(measured["title"], loc="left", fontsize=10)
    _finish(figure, environment, path)


def memory(measured: dict[str, Any], environment: dict[str, Any], path: Path) -> None:
    """Bytes a parameter that stay between steps, stacked: weights, gradients, state."""
    pyplot = _pyplot()
    rows = sorted(_one_of_each(measured["contenders"]), key=lambda row: sum(parts(row)), reverse=True)
    size = (7.5, 1.3 + ROW_HEIGHT * max(1, len(rows)))
    figure, panel = pyplot.subplots(figsize=size, layout="constrained")
    names = [_memory_title(row) for row in rows]
    left = [0.0] * len(rows)
    for which, (part, color) in enumerate(PARTS.items()):
        widths = [parts(row)[which] for row in rows]
        panel.barh(names, widths, left=left, color=color, height=0.7, label=part)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for i, total in enumerate(left):
        panel.text(total + 0.15, i, f"{total:.1f}".removesuffix(".0"), va="center", fontsize=9)
    panel.set_xlabel("bytes a parameter")
    panel.set_xlim(0, 1.1 * max(left, default=1.0))
    panel.set_title(measured["title"], loc="left", fontsize=10)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    _finish(figure, environment, path)


def fastest(rows: Sequence[Row]) -> list[Row]:
    """The rows to show, the slowest first. Of a rival's ways to run the same optimizer the fastest stays."""
    kept: dict[Any, Row] = {}
    for row in rows:
        if "failed" in row:
            continue
        key = row["name"] if is_danlu(row) else (of(row).label, of(row).dtype)
        best = kept.setdefault(key, row)
        if row["ms"]["median"] < best["ms"]["median"]:
            kept[key] = row
    return sorted(kept.values(), key=lambda row: relative(row)["median"], reverse=True)


def relative(row: Row) -> dict[str, float]:
    """Times by the baseline's in the same round; in ms where the baseline was not measured."""
    ratio = row["ratio"]
    if ratio is None:
        return {name: row["ms"][name] for name in ("median", "low", "high")}
    return {"median": 1 / ratio["median"], "low": 1 / ratio["high"], "high": 1 / ratio["low"]}


def parts(row: Row) -> tuple[float, float, float]:
    """Bytes a parameter of weights, gradients and state."""
    itemsize = float(of(row).dtype.itemsize)
    return itemsize, itemsize, row["state_bytes_per_parameter"]


def of(row: Row) -> Contender:
    return CONTENDERS[row["name"]]


def is_danlu(row: Row) -> bool:
    return of(row).label.startswith("danlu.")


def _panel_of_times(panel: Any, rows: list[Row]) -> None:
    spreads = [relative(row) for row in rows]
    medians = [s["median"] for s in spreads]
    places = range(len(rows))
    panel.barh(places, medians, color=[OF_DANLU if is_danlu(row) else OF_OTHERS for row in rows], height=0.7)
    panel.hlines(places, [s["low"] for s in spreads], [s["high"] for s in spreads], color="black", lw=1)
    ceilings = [row["share_of_ceiling"]["median"] * m for row, m in zip(rows, medians, strict=True)]
    panel.plot(ceilings, places, "|", color="black", markersize=11, markeredgewidth=2)
    ends = [max(s["high"], c) for s, c in zip(spreads, ceilings, strict=True)]
    for place, end, median in zip(places, ends, medians, strict=True):
        panel.text(end + 0.012 * max(ends), place, f"{median:.2f}", va="center", fontsize=9)
    panel.set_yticks(places, [of(row).title for row in rows])
    baseline = {True: f"time of a step, {CONTENDERS[BASELINE].title} = 1", False: "ms a step"}
    axis = baseline[all(row["ratio"] is not None for row in rows)]
    panel.set_xlabel(f"{axis}\nthick tick: bandwidth ceiling, thin line: quartiles")
    panel.set_xlim(0, 1.12 * max(ends))


def _one_of_each(rows: Sequence[Row]) -> list[Row]:
    kept = {(of(row).label, of(row).dtype): row for row in reversed(rows) if "failed" not in row}
    return list(kept.values())


def _memory_title(row: Row) -> str:
    return of(row).label + (" (bf16)" if of(row).dtype == torch.bfloat16 else "")


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _finish(figure: Any, environment: dict[str, Any], path: Path) -> None:
    for panel in figure.axes:
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(axis="y", length=0)
        panel.set_axisbelow(True)
        panel.grid(axis="x", alpha=0.3)
    threads = f"{environment['threads']} threads, " if "threads" in environment else ""
    said = f"{environment['device']}, {threads}torch {environment['torch']}, fp32 unless named"
    figure.suptitle(said, fontsize=9, color="0.35", x=0.99, ha="right")
    figure.savefig(path, dpi=130)
    _pyplot().close(figure)


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        file = Path(argument)
        print("\n".join(draw(results_file.read(file), file.with_suffix(".png"))))
