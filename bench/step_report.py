"""What the timing of steps has to say: a table for each workload."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from contenders import BASELINE

if TYPE_CHECKING:
    from rich.table import Table

_COMMON = f"""\
ratio     how many times faster than {BASELINE} in the same round
GB/s      the bytes that a step has to touch, by its time
state     bytes kept per parameter
"""
LEGENDS = {
    "cpu": f"""\
ms        median over the rounds, with quartiles
{_COMMON}\
ceiling   an in-place loop over as many bytes, right after the step: what the memory gives; the whole
          step's speed by its speed, and that of danlu's kernels alone
host      microseconds per tensor, measured with as many tensors of one element
extra     the most memory that torch's allocators held during a step, beyond what they held before it, and
          what danlu's kernels hold beside the tensors
""",
    "cuda": f"""\
ms        median over the rounds, with quartiles, of the GPU's time, the whole step being enqueued before the
          GPU comes to it; * where the host held it up
{_COMMON}\
ceiling   a kernel with as many bytes in place, right after the step: what the memory gives; the speed of
          the step by its speed, and that of its kernels alone
launches  kernels of a step; their time and number are the profiler's
host      microseconds per tensor until step() returns, the GPU being idle before it
extra     the most memory that torch's allocator held during a step, beyond what it held before it, and
          what danlu keeps for sums between the passes of a step
""",
}


def table(measured: dict[str, Any]) -> Table:
    from rich.table import Table  # where it is not installed, there are plots all the same

    rows = [row for row in measured["contenders"] if "failed" not in row]
    failed = [row for row in measured["contenders"] if "failed" in row]
    shown = Table(
        title=measured["title"],
        caption="\n".join(
            [f"{row['name']}: {row['failed']}" for row in failed]
            + [
                f"{pair['name']}: {text(pair['ratio'], '.2f')} times as fast as {pair['than']}"
                for pair in measured["pairs"]
            ]
        )
        or None,
        caption_justify="left",
    )
    profiled = any("launches" in row for row in rows)
    shown.add_column("optimizer", no_wrap=True)
    headings = ["ms", "ratio", "GB/s", "step/\nceiling", "kernels/\nceiling", *["launches"] * profiled]
    for heading in (*headings, "host\nus/tensor", "state\nB/parameter", "extra\nMB"):
        shown.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        shown.add_row(
            row["name"],
            text(row["ms"], ".1f" if row["ms"]["median"] > 20 else ".2f") + "*" * row["host_bound"],
            text(row["ratio"], ".2f"),
            f"{row['GB_per_s']['median']:.1f}",
            f"{row['share_of_ceiling']['median']:.0%}",
            f"{row['kernel_share_of_ceiling']['median']:.0%}" if "kernel_ms" in row else "",
            *[f"{row.get('launches', '')}"] * profiled,
            f"{row['host_us_per_tensor']['median']:.2f}",
            f"{row['state_bytes_per_parameter']:.2f}",
            f"{row['peak_extra_bytes'] / 1e6:.1f}",
        )
    return shown


def text(spread: dict[str, float] | None, form: str) -> str:
    """Median and quartiles."""
    if spread is None:
        return ""
    return f"{spread['median']:{form}} ({spread['low']:{form}}-{spread['high']:{form}})"
