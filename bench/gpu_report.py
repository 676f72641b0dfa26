"""What the stages of `bench/gpu.py` have to say: some lines of text, and a plot."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bars
import step_plots
import step_report

MOST_LINES = 120
MOST_FAILURES = 5


def lines(stages: dict[str, Any]) -> list[str]:
    """At most 120, for a reader who sees only the end of the output."""
    results = {name: entry["result"] for name, entry in stages.items() if "result" in entry}
    found: list[str] = []
    for name in SECTIONS:
        if name in results:
            found += section(name, results[name])
    for name, entry in stages.items():
        if "error" in entry:
            found.append(f"FAILED {name}: {entry['error'].strip().splitlines()[-1][:150]}")
        if "skipped" in entry:
            found.append(f"skipped {name}: {entry['skipped']}")
    took = ", ".join(f"{name} {entry['seconds']:.0f}" for name, entry in stages.items() if "seconds" in entry)
    return [*found[: MOST_LINES - 1], f"seconds: {took}"]


def section(name: str, result: Any) -> list[str]:
    """What one stage has to say."""
    try:
        return list(SECTIONS[name](result)) if name in SECTIONS else []
    except Exception as error:  # a report must not be lost to one odd number
        return [f"{name}: cannot be shown: {type(error).__name__}: {error}"]


def plot(results: dict[str, Any], path: Path) -> None:
    """As for bench/step_time.py, where at least one workload was measured."""
    measured = [*results.get("models", []), *results.get("reductions", [])]
    measured = measured or [results[name] for name in ("first", "first_reductions") if name in results]
    workloads = [*measured, *filter(None, [results.get("small_tensors")])]
    if workloads:
        step_plots.times(workloads, results["environment"], path)


def _machine(result: dict[str, Any]) -> Iterator[str]:
    if result["absent"]:
        yield "not installed: " + ", ".join(f"{name} ({loss})" for name, loss in result["absent"].items())


def _parameters(result: dict[str, Any]) -> Iterator[str]:
    yield f"indexed reads of the last kernel parameters: {result['outcome']}"


def _modules(result: dict[str, Any]) -> Iterator[str]:
    yield "prebuilt modules" if result["prebuilt"] else f"built here: {result['why']}"


def _smoke(result: dict[str, Any]) -> Iterator[str]:
    for engine, found in result.items():
        wrong = [check for check in found["checks"] if not check["right"]]
        count = len(found["checks"])
        yield f"{engine}: {count - len(wrong)} of {count} first checks right{_because(found['fault'])}"
        for check in wrong[:MOST_FAILURES]:
            said = check.get("differences") or check["error"].strip().splitlines()[-1:]
            yield f"  {check['check']}: {said[0][:150]}"


def _because(fault: str | None) -> str:
    return f", {fault.upper()}: not measured" if fault else ""


def _warm(result: dict[str, Any]) -> Iterator[str]:
    if result["exit_status"] != 0:
        yield f"Triton's cache: exit status {result['exit_status']}: {result['output'].strip()[-150:]}"


def _ncu(result: dict[str, Any]) -> Iterator[str]:
    yield f"ncu: {result['outcome']}"
    for kernel in result.get("kernels", []):
        shown = [f"{name.split(': ')[1]} {value} {unit}" for name, (value, unit) in kernel["metrics"].items()]
        yield f"  {kernel['kernel'][:60]}: {', '.join(shown[:5])}"


def _environment(result: dict[str, Any]) -> Iterator[str]:
    names = ("device", "driver", "cuda", "torch", "triton", "python", "multiprocessors", "built_for")
    yield ", ".join(f"{name} {result[name]}" for name in names)


def _tests(result: dict[str, Any]) -> Iterator[str]:
    yield f"tests: {result['counts']}, exit status {result['exit_status']}"
    for failure in result["failures"][:MOST_FAILURES]:
        yield f"  {failure['test'].split('/')[-1]}: {[*failure['message'].splitlines(), ''][0][:90]}"


def _ceiling(result: dict[str, Any]) -> Iterator[str]:
    yield "GB/s: " + ", ".join(f"{name.removesuffix('_GB_per_s')} {x:.0f}" for name, x in result.items())


def _models(result: list[dict[str, Any]]) -> Iterator[str]:
    for measured in result:
        yield from _table(measured)


def _table(measured: dict[str, Any]) -> Iterator[str]:
    head = f"{'ms':>9} {'ratio':>6} {'GB/s':>6} {'ceiling':>7} {'kernels':>8} {'launches':>8} {'host ms':>8}"
    yield f"{measured['id']:20} {head} {'B/param':>8} {'extra MB':>9}"
    for row in measured["contenders"]:
        if "failed" in row:
            yield f"{row['name']:20} {row['failed'][:100]}"
            continue
        ratio = f"{row['ratio']['median']:.2f}" if row["ratio"] else ""
        kernels = f"{row['kernel_share_of_ceiling']['median']:.0%}" if "kernel_ms" in row else ""
        host = row["host_us_per_tensor"]["median"] * measured["tensors"] / 1e3
        yield (
            f"{row['name']:20} {row['ms']['median']:8.3f}{'*' if row['host_bound'] else ' '} {ratio:>6} "
            f"{row['GB_per_s']['median']:6.0f} {row['share_of_ceiling']['median']:7.0%} {kernels:>8} "
            f"{row.get('launches', ''):>8} {host:8.3f} {row['state_bytes_per_parameter']:8.2f} "
            f"{row['peak_extra_bytes'] / 1e6:9.1f}"
        )


def _reductions(result: list[dict[str, Any]]) -> Iterator[str]:
    for measured in result:
        head = f"{'ms':>9} {'times torch foreach':>20} {'ceiling':>7} {'launches':>8} {'extra MB':>9}"
        yield f"{measured['id']:28} {head}"
        by_foreach = {pair["name"]: pair["ratio"] for pair in measured["pairs"] if "foreach" in pair["than"]}
        for row in measured["contenders"]:
            if "failed" in row:
                yield f"{row['name']:28} {row['failed'][:90]}"
                continue
            times = step_report.text(by_foreach.get(row["name"]), ".2f")
            asked = "; ".join(map(bars.text, measured["bars"].get(row["name"], [])))
            yield (
                f"{row['name']:28} {row['ms']['median']:8.3f}{'*' if row['host_bound'] else ' '} {times:>20} "
                f"{row['share_of_ceiling']['median']:7.0%} {row.get('launches', ''):>8} "
                f"{row['peak_extra_bytes'] / 1e6:9.1f}  {asked}"
            ).rstrip()


def _gradient_norm(result: list[dict[str, Any]]) -> Iterator[str]:
    alike: dict[str, list[str]] = {}
    for row in result:
        share = f"{row['share_of_reading']['median']:.2f} of reading"
        shown = bars.text(row["bar"]) if "bar" in row else share
        alike.setdefault(f"norm, {row['dtype']} on {row['workload']}", []).append(
            f"{row['name']} {row['ms']['median']:.3f} ms, {shown}"
        )
    for head, ways in alike.items():
        yield f"{head}: {'; '.join(ways)}"


def _overlap(result: list[dict[str, Any]]) -> Iterator[str]:
    for row in result:
        saves = row["saves"]
        yield (
            f"{row['optimizer']} {row['dtype']} on {row['workload']}: {row['ms']['median']:.3f} ms, without "
            f"overlap {saves['median']:.3f} times as long ({saves['low']:.3f} to {saves['high']:.3f})"
        )


def _groups(result: list[dict[str, Any]]) -> Iterator[str]:
    for row in result:
        times = ", ".join(
            f"{one['size']} {one['ms']['median']:.3f} ({one['by_default']['median']:.2f})"
            for one in row["sizes"]
        )
        head = f"adafactor's groups, {row['dtype']} on {row['workload']}, ms (by the default's)"
        yield f"{head}: {times}; best {row['best']}"


def _lazy_steps(result: list[dict[str, Any]]) -> Iterator[str]:
    alike: dict[str, list[str]] = {}
    for row in result:
        shown = f"{row['step']} {row['ms']['median']:.3f} ({row['ratio']['median']:.1f})"
        alike.setdefault(row["optimizer"], []).append(shown)
    for optimizer, ways in alike.items():
        yield f"{optimizer} on an embedding, ms (times all rows): {', '.join(ways)}"


def _small_tensors(measured: dict[str, Any]) -> Iterator[str]:
    yield f"{measured['id']}, ms (times torch-adamw), launches:"
    shown = []
    for row in measured["contenders"]:
        if "failed" in row:
            yield f"  {row['name']}: {row['failed'][:100]}"
            continue
        ratio = f" ({row['ratio']['median']:.2f})" if row["ratio"] else ""
        shown.append(f"{row['name']} {row['ms']['median']:.3f}{ratio}, {row.get('launches', '?')}")
    for at in range(0, len(shown), 4):
        yield f"  {'; '.join(shown[at : at + 4])}"


def _zero_gradients(result: list[dict[str, Any]]) -> Iterator[str]:
    ratios = ", ".join(f"{row['name']} {row['zero_to_usual']['median']:.3f}" for row in result)
    yield f"time over zero gradients by time over others: {ratios}"


def _cuda_graph(result: list[dict[str, Any]]) -> Iterator[str]:
    for row in result:
        times = ", ".join(
            f"{name} {row[f'{name}_ms']['median']:.3f} (host {row[f'{name}_host_ms']['median']:.3f})"
            for name in ("eager", "capturable", "replay")
        )
        yield f"{row['optimizer']} on {row['workload']}, ms: {times}"


def _host_time(measured: dict[str, Any]) -> Iterator[str]:
    rows = [row for row in measured["contenders"] if "failed" not in row]
    us = [f"{row['name']} {row['host_us_per_tensor']['median'] * measured['tensors']:.0f}" for row in rows]
    yield f"host us per step, {measured['tensors']} tensors: {', '.join(us)}"


def _profiles(result: list[dict[str, Any]]) -> Iterator[str]:
    ways = ("replay", "capturable")
    counts = ", ".join(
        f"{row['optimizer']} on {row['workload']} {' and '.join(str(row[way]['kernels']) for way in ways)}"
        for row in result
    )
    yield f"kernels of a replay and of a capturable step: {counts}"


def _shapes(result: list[dict[str, Any]]) -> Iterator[str]:
    wrong = sum(not row["same_bits"] for row in result)
    yield f"shapes: {len(result)} rows, {wrong} with other bits; threads/elements/min_blocks/chunk"
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in result:
        groups.setdefault((row["rule"], row["formats"], row["workload"]), []).append(row)
    for key, rows in groups.items():
        default, best = rows[0], min(rows, key=lambda row: row["ms"])
        shape = "/".join(str(best[name]) for name in ("threads", "elements", "min_blocks", "chunk"))
        yield (
            f"  {' '.join(key):38} default {default['ms']:.3f} ms {default['gbps']:.0f} GB/s, "
            f"best {shape} {best['ms']:.3f} ms {best['gbps']:.0f} GB/s"
        )


def _compiled_adafactor(measured: dict[str, Any]) -> Iterator[str]:
    for row in measured["contenders"]:
        took = row["failed"][:100] if "failed" in row else f"{step_report.text(row['ms'], '.3f')} ms"
        yield f"{row['name']}: {took}"
    for pair in measured["pairs"]:
        yield f"{pair['name']}: {step_report.text(pair['ratio'], '.2f')} times as fast as {pair['than']}"


def _memcheck(result: dict[str, Any]) -> Iterator[str]:
    yield f"memcheck: {result['outcome']}"


SECTIONS = {
    "machine": _machine,
    "parameters": _parameters,
    "modules": _modules,
    "environment": _environment,
    "smoke": _smoke,
    "warm": _warm,
    "ceiling": _ceiling,
    "first": _table,
    "first_reductions": lambda measured: _reductions([measured]),
    "tests": _tests,
    "models": _models,
    "reductions": _reductions,
    "gradient_norm": _gradient_norm,
    "groups": _groups,
    "overlap": _overlap,
    "lazy_steps": _lazy_steps,
    "small_tensors": _small_tensors,
    "zero_gradients": _zero_gradients,
    "cuda_graph": _cuda_graph,
    "host_time": _host_time,
    "profiles": _profiles,
    "shapes": _shapes,
    "ncu": _ncu,
    "compiled": _table,
    "compiled_adafactor": _compiled_adafactor,
    "memcheck": _memcheck,
}
