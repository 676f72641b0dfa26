"""What a training run has to say: a table and a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
from rich.table import Table

from recipes import WRAPPERS

matplotlib.use("Agg")
from matplotlib import pyplot


def table(results: dict[str, Any]) -> Table:
    settings, seconds = results["settings"], sum(run["seconds"] for run in results["runs"])
    title = (
        f"{results['parameters'] / 1e6:.2f} M parameters, {settings['steps']:,} steps on "
        f"{results['environment']['device']}, {seconds:.0f} s of training in total"
    )
    shown = Table(title=title)
    shown.add_column("optimizer", overflow="fold")
    for heading in ("lr", "weight\ndecay", "held-out\nloss", "bits per\nbyte", "training\ns"):
        shown.add_column(heading, justify="right")
    for heading in ("optimizer\nms per step", "optimizer\nshare", "state bytes per\nparameter"):
        shown.add_column(heading, justify="right")
    for run in results["runs"]:
        shown.add_row(
            run["name"],
            f"{run['lr']:g}",
            "" if run["weight_decay"] is None else f"{run['weight_decay']:g}",
            f"{run['held_out_loss']:.4f}",
            f"{run['bits_per_byte']:.4f}",
            f"{run['seconds']:.1f}",
            f"{run['optimizer_seconds'] / settings['steps'] * 1e3:.3f}",
            f"{run['optimizer_seconds'] / run['seconds']:.1%}",
            f"{run['state_bytes_per_parameter']:.2f}",
        )
    return shown


def plot(results: dict[str, Any], path: Path) -> None:
    """Held-out loss against time and against steps; with wrappers against steps, an optimizer a panel.

    What wrappers cost is little beside the rest of a step: times would show the machine's other work.
    """
    runs = results["runs"]
    bases = list(dict.fromkeys(_base(run) for run in runs))
    of_wrappers = any(run.get("wrappers") for run in runs)
    panels = [(base, "step", [run for run in runs if _base(run) == base]) for base in bases]
    if not of_wrappers:
        panels = [("", "seconds", runs), ("", "step", runs)]
    columns = len(panels)
    figure, grid = pyplot.subplots(
        1, columns, sharey=True, squeeze=False, figsize=(6 * columns, 5), layout="constrained"
    )
    for axes, (title, axis, shown) in zip(grid[0], panels, strict=True):
        for run in shown:
            bare = of_wrappers and not run["wrappers"]
            axes.plot(
                run["curve"][axis],
                run["curve"]["held_out_loss"],
                label=in_code(run),
                **_style(in_code(run), bare),
            )
        axes.set(title=title, xlabel=AXES[axis])
        axes.grid(alpha=0.3)
        if of_wrappers or axis == "step":
            axes.legend()
    # the fall from chance to letter frequencies would take most of the height; wrappers differ by less
    part = 4 if of_wrappers else 8
    losses = [run["curve"]["held_out_loss"] for run in runs]
    grid[0][0].set_ylim(top=max(curve[len(curve) // part] for curve in losses))
    grid[0][0].set_ylabel("held-out loss (nats per byte)")
    settings, environment = results["settings"], results["environment"]
    figure.suptitle(
        f"byte-level GPT, {results['parameters'] / 1e6:.2f} M parameters, {settings['dtype']}, "
        f"{environment['device']}, {environment['threads']} threads, torch {environment['torch']}"
    )
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def in_code(run: dict[str, Any]) -> str:
    """What the optimizer is called in code, wrappers outermost first."""
    package, *_, name = run["optimizer"].split(".")
    inner = f"torch.optim.{name}" if package == "torch" else f"danlu.{name}"
    for wrapper in run.get("wrappers", ()):
        inner = f"{WRAPPERS[wrapper['name']][0].__name__}({inner})"
    return inner


AXES = {"step": "steps", "seconds": "training time (s)"}


def _base(run: dict[str, Any]) -> str:
    return in_code({**run, "wrappers": ()})


def _style(name: str, bare: bool) -> dict[str, Any]:
    if bare:
        return dict(color="black", linewidth=2.5, alpha=0.6)
    return dict(color="black", linestyle="--") if name.startswith("torch") else {}
