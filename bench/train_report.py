"""What a training run has to say: a table and a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
from rich.table import Table

matplotlib.use("Agg")
from matplotlib import pyplot


def table(results: dict[str, Any]) -> Table:
    settings, seconds = results["settings"], sum(run["seconds"] for run in results["runs"])
    title = (
        f"{results['parameters'] / 1e6:.2f} M parameters, {settings['steps']:,} steps on "
        f"{results['environment']['device']}, {seconds:.0f} s of training in total"
    )
    shown = Table(title=title)
    shown.add_column("optimizer")
    for heading in ("lr", "weight\ndecay", "held-out\nloss", "bits per\nbyte", "training\ns"):
        shown.add_column(heading, justify="right")
    for heading in ("optimizer\nms per step", "optimizer\nshare", "state bytes per\nparameter"):
        shown.add_column(heading, justify="right")
    for run in results["runs"]:
        shown.add_row(
            run["name"],
            f"{run['lr']:g}",
            f"{run['weight_decay']:g}",
            f"{run['held_out_loss']:.4f}",
            f"{run['bits_per_byte']:.4f}",
            f"{run['seconds']:.1f}",
            f"{run['optimizer_seconds'] / settings['steps'] * 1e3:.3f}",
            f"{run['optimizer_seconds'] / run['seconds']:.1%}",
            f"{run['state_bytes_per_parameter']:.2f}",
        )
    return shown


def plot(results: dict[str, Any], path: Path) -> None:
    """Two panels: held-out loss against training time and against steps."""
    figure, (by_time, by_step) = pyplot.subplots(1, 2, sharey=True, figsize=(12, 5), layout="constrained")
    highest = []
    for run in results["runs"]:
        curve = run["curve"]
        style = dict(color="black", linestyle="--") if run["name"].startswith("torch") else {}
        by_time.plot(curve["seconds"], curve["held_out_loss"], label=run["name"], **style)
        by_step.plot(curve["step"], curve["held_out_loss"], label=run["name"], **style)
        highest.append(curve["held_out_loss"][len(curve["step"]) // 8])
    # the fall from chance to letter frequencies would take most of the height
    by_time.set_ylim(top=max(highest))
    by_time.set(xlabel="training time (s)", ylabel="held-out loss (nats per byte)")
    by_step.set(xlabel="steps")
    by_step.legend()
    for axes in (by_time, by_step):
        axes.grid(alpha=0.3)
    environment = results["environment"]
    figure.suptitle(
        f"byte-level GPT, {results['parameters'] / 1e6:.2f} M parameters, {results['settings']['dtype']}, "
        f"{environment['device']}, {environment['threads']} threads, torch {environment['torch']}"
    )
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
