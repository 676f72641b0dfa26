"""Steps of parameters that ranks share: on paper for large clusters, and measured on a few processes.

    python bench/sharded.py paper                  three Llamas on 256 to 8,192 ranks, some 20 seconds
    python bench/sharded.py paper --models llama-3-8b --ranks 64 --tp 2 --optimizers lamb,amos
    python bench/sharded.py measure                on 1 to 4 processes of this machine, some 5 minutes

`paper` pretends the ranks (torch's fake process group). It counts the all-reduces of a step by danlu's own
layout, for rank 0 under FSDP2, with --tp also under tensor parallelism. Times are what NCCL's tuning
constants give for nodes of eight H100 with 400 Gb/s for each; the share is of the reduce-scatter of gradients
in bf16. Nothing is measured.

`measure` times steps of parameters that `fully_shard` has sharded, over gloo. All contenders step the same
parameters and gradients, in turn. It also times the host's work for many tiny parameters, and writes
sharded.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

import exchanges
import network
import sharded_steps
import workloads
from harness import environment, positive
from out_option import add_out_option

LLAMAS = (workloads.llama_8b, workloads.llama_70b, workloads.llama_405b)
MODELS = {
    model.id: model for model in (make() for make in (workloads.gpt2_small, workloads.llama_1b, *LLAMAS))
}


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    console = Console(width=110)
    if options.command == "paper":
        return on_paper(options, console)
    measured = sharded_steps.measure(
        options.workload, options.contenders, options.ranks, options.tensors, options.rounds, console.print
    )
    results = {"environment": {**environment(), "threads": 1}, "rounds": options.rounds, **measured}
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "sharded.json").write_text(json.dumps(results, indent=2) + "\n")
    for table in sharded_steps.tables(results):
        console.print(table)
    console.print(f"wrote sharded.json to {options.out}")


def on_paper(options: argparse.Namespace, console: Console) -> None:
    for tp in options.tp:
        shown = Table(title=f"FSDP2, tensor parallelism of {tp}" if tp > 1 else "FSDP2")
        for heading in ("model", "ranks", "optimizer"):
            shown.add_column(heading, justify="right" if heading == "ranks" else "left")
        for heading in ("all-\nreduces", "kB of\na rank", "ms", "reduce-\nscatter, ms", "share"):
            shown.add_column(heading, justify="right")
        for ranks in options.ranks:
            with exchanges.pretended(ranks, tp) as mesh:
                for model, name in itertools.product(options.models, options.optimizers):
                    optimizer = exchanges.OPTIMIZERS[name](exchanges.sharded(model, mesh))
                    found = exchanges.of_a_step(optimizer, mesh)
                    scatter = exchanges.reduce_scatter_us(model, mesh)
                    shown.add_row(model.id, f"{ranks:,}", name, *_figures(found, scatter))
        console.print(shown)


def _figures(found: Sequence[exchanges.AllReduce], scatter: float) -> list[str]:
    us, size = exchanges.total_us(found), sum(one.bytes for one in found)
    share = us / scatter if scatter else 0.0
    return [str(len(found)), f"{size / 1e3:,.2f}", f"{us / 1e3:.3f}", f"{scatter / 1e3:,.1f}", f"{share:.2%}"]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)

    paper = commands.add_parser("paper", help="all-reduces, bytes and milliseconds on large clusters")
    add = paper.add_argument
    llamas = [model().id for model in LLAMAS]
    add("--models", metavar="NAME,...", type=some_of(MODELS), default=[MODELS[name] for name in llamas])
    add("--ranks", metavar="N,...", type=counts, default=[256, 1024, 8192], help="default: 256,1024,8192")
    add("--tp", metavar="N,...", type=counts, help="tensor parallelism (default: those of 1,8 that fit)")
    names = {name: name for name in exchanges.OPTIMIZERS}
    default = ["adamw+norm", "adafactor", "lamb"]
    add(
        "--optimizers",
        metavar="NAME,...",
        type=some_of(names),
        default=default,
        help=f"of {', '.join(names)}",
    )

    measure = commands.add_parser("measure", help="times of steps on processes of this machine")
    add = measure.add_argument
    add("--ranks", metavar="N,...", type=counts, default=[2, 4], help="processes (default: 2,4)")
    add("--rounds", metavar="N", type=positive, default=7, help="default: %(default)s")
    add(
        "--workload",
        type=one_of(sharded_steps.WORKLOADS),
        default=sharded_steps.WORKLOADS["matrices"],
        help="of " + ", ".join(sharded_steps.WORKLOADS) + " (default: matrices)",
    )
    add("--tensors", metavar="N", type=positive, default=1000, help="tiny ones (default: %(default)s)")
    contenders = sharded_steps.CONTENDERS
    add(
        "--contenders",
        metavar="NAME,...",
        type=some_of(contenders),
        default=list(contenders.values()),
        help=f"of {', '.join(contenders)}",
    )
    add_out_option(measure)

    options = parser.parse_args(arguments)
    if options.command == "paper":
        options.tp = options.tp or [tp for tp in (1, 8) if all(ranks % tp == 0 for ranks in options.ranks)]
        for ranks in options.ranks:
            if ranks > network.GPUS_OF_NODE and ranks % network.GPUS_OF_NODE:
                paper.error(f"--ranks {ranks} fills no nodes of {network.GPUS_OF_NODE}")
            for tp in options.tp:
                if network.GPUS_OF_NODE % tp or ranks % tp:
                    paper.error(f"--tp {tp} must divide {network.GPUS_OF_NODE} and --ranks {ranks}")
    return options


def some_of(table: dict[str, Any]) -> Callable[[str], list[Any]]:
    """The type of an option that lists names."""
    return lambda text: [one_of(table)(name) for name in text.split(",")]


def one_of(table: dict[str, Any]) -> Callable[[str], Any]:
    def find(name: str) -> Any:
        if name not in table:
            raise argparse.ArgumentTypeError(f"must name some of {', '.join(table)}, got {name!r}")
        return table[name]

    return find


def counts(text: str) -> list[int]:
    """The type of an option that lists numbers."""
    return [positive(number) for number in text.split(",")]


if __name__ == "__main__":
    main()
