"""The benchmarks of sharded steps: what they say on paper, against sums by hand and what is measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import exchanges
import network
import sharded
import sharded_steps
from exchanges import AllReduce
from workloads import Workload

TINY = Workload("tiny", "a few tensors", [(12, 8), (8, 12), (8,)], frozenset({1}))


def on_paper(optimizer: str, ranks: int, tp: int, model: Workload = TINY) -> list[AllReduce]:
    with exchanges.pretended(ranks, tp) as mesh:
        return exchanges.of_a_step(exchanges.OPTIMIZERS[optimizer](exchanges.sharded(model, mesh)), mesh)


def test_llamas() -> None:
    llamas = [sharded.MODELS[make().id] for make in sharded.LLAMAS]
    assert [(len(model.shapes), round(model.elements / 1e9, 2)) for model in llamas] == [
        (291, 8.03),
        (723, 70.55),
        (1137, 405.85),
    ]
    for model in llamas:
        # attention's output and the perceptron's
        assert {model.shapes[i][0] for i in model.by_columns} == {model.shapes[0][1]}
        assert len(model.by_columns) == 2 * (len(model.shapes) // 9)


def test_what_ranks_exchange() -> None:
    assert on_paper("adamw", 16, 1) == []
    # the norm, and five numbers on which the ranks agree
    assert on_paper("adamw+norm", 16, 1) == [AllReduce(0, "dp", 16, 8, 1 + 5)]
    # two norms of each tensor, after the norm of gradients
    norm, norms = on_paper("lamb+norm", 16, 1)
    assert (norm, norms) == (AllReduce(0, "dp", 16, 8, 1 + 5), AllReduce(1, "dp", 16, 8, 2 * 3))
    # of a matrix its columns and two numbers for the mean of its rows, then two norms; of a vector norms
    first, second = on_paper("adafactor", 16, 1)
    assert first == AllReduce(0, "dp", 16, 8, (8 + 2) + (12 + 2) + 2 + 5)
    assert second == AllReduce(1, "dp", 16, 8, 2 * 2)


def test_what_ranks_exchange_under_tensor_parallelism() -> None:
    """Of 16 ranks two share a matrix by tensor parallelism, four on a node by FSDP2."""
    found = {(one.round, one.over): one for one in on_paper("adafactor", 16, 2)}
    assert {(one.ranks, one.on_node) for one in found.values() if one.over == "dp"} == {(8, 4)}
    assert {(one.ranks, one.on_node) for one in found.values() if one.over == "tp"} == {(2, 2)}
    # half of the second matrix' columns
    assert found[0, "dp"].numbers == (8 + 2) + (12 // 2 + 2) + 2 + 5
    # all columns of the first matrix, rows of the second, of which a rank has one; its mean is over FSDP2's
    assert found[0, "tp"].numbers == (8 + 2) + (1 + 1) + 5
    assert [found[1, over].numbers for over in ("dp", "tp")] == [2 * 2, 2 * 2]


def test_times_on_paper() -> None:
    # a tree with the protocol LL over 128 nodes, seven hops within a node and seven between: all latency
    assert network.all_reduce(48, 1024, 8) == pytest.approx(6.8 + 2 * (7 * 0.6 + 7 * 5.0) + 2 * 48 / 90e3)
    # LL128 at 0.9 of 360 GB/s
    wanted = 14.0 + 2 * (7 * 1.25 + 7 * 8.5) + 2 * 10e6 / 324e3
    assert network.all_reduce(10e6, 1024, 8) == pytest.approx(wanted)
    # a ring of two GPUs of a node, whose two hops are within it
    assert network.all_reduce(16, 2, 2) == pytest.approx(6.6 + 2 * 0.6 + 2 * 16 / 90e3)
    # a network card for each rank that is alone on its node, as under tensor parallelism of 8
    assert network.bandwidth(1, 128) == 45e3
    assert network.reduce_scatter(8e9, 1024, 8) == pytest.approx(8e9 * 1023 / 1024 / 360e3)


def test_a_table_on_paper(capsys: pytest.CaptureFixture[str]) -> None:
    """Of Llama 3 8B on 1,024 ranks."""
    of = ("--models", "llama-3-8b", "--ranks", "1024", "--tp", "1", "--optimizers", "adafactor")
    sharded.main(["paper", *of])
    printed = capsys.readouterr().out
    (row,) = [line for line in printed.splitlines() if "adafactor" in line]
    *_, reduces, size, ms, scatter, share = row.strip("│ ").replace("│", " ").split()
    assert (reduces, size, scatter) == ("2", "10,035.32", "44.6")
    assert float(ms) == pytest.approx(0.2125 + 0.0853, abs=1e-3)
    assert float(share[:-1]) == pytest.approx(100 * 0.2978 / 44.6, abs=1e-2)


def test_steps_on_two_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A small run, in which is exchanged what is said on paper."""
    monkeypatch.setitem(sharded_steps.WORKLOADS, "tiny", TINY)
    monkeypatch.setattr(sharded_steps, "HOST_RANKS", (1,))
    small = ("--ranks", "2", "--rounds", "1", "--workload", "tiny", "--tensors", "3")
    sharded.main(["measure", *small, "--out", str(tmp_path)])
    results = json.loads((tmp_path / "sharded.json").read_text())
    (steps,), (host,) = results["steps"], results["host"]
    assert (steps["ranks"], host["ranks"], host["tensors"]) == (2, 1, 3)
    for of in (steps, host):
        rows = {row["name"]: row for row in of["rows"]}
        assert list(rows) == list(sharded_steps.CONTENDERS)
        for name, row in rows.items():
            assert all(0 < row[key]["low"] <= row[key]["high"] for key in ("ms", "ratio", "ratio_to_clipped"))
            # danlu looks at shards
            assert (row["dtensor_arguments"] > 0) == name.startswith("torch")
            for key, rival in (("ratio", "torch-adamw"), ("ratio_to_clipped", "torch-adamw+norm")):
                ratio = row["ms"]["median"] / rows[rival]["ms"]["median"]
                assert row[key]["median"] == pytest.approx(ratio)
    measured = {row["name"]: (row["all_reduces"], row["bytes"]) for row in steps["rows"]}
    for name in exchanges.OPTIMIZERS.keys() & measured.keys():
        told = on_paper(name, 2, 1)
        assert measured[name] == (len(told), sum(one.bytes for one in told)), name
    assert measured["torch-adamw"] == (0, 0)
    printed = capsys.readouterr().out
    assert "Steps on 2 ranks: a few tensors" in printed
    assert "The host's work, ranks: 1: 3 tensors" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: command"),
        (["paper", "--models", "gpt-5"], "must name some of gpt2-small"),
        (["paper", "--optimizers", "lamb,sgd"], "got 'sgd'"),
        (["paper", "--ranks", "12"], "--ranks 12 fills no nodes of 8"),
        (["paper", "--ranks", "4", "--tp", "8"], "--tp 8 must divide 8 and --ranks 4"),
        (["paper", "--ranks", "24", "--tp", "3"], "--tp 3 must divide 8"),
        (["measure", "--contenders", "adamw,sgd"], "got 'sgd'"),
        (["measure", "--ranks", "0"], "must be at least 1, got 0"),
        (["measure", "--workload", "llama"], "must name some of gpt2-small"),
    ],
    ids=str,
)
def test_wrong_options_are_named(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        sharded.parse(arguments)
    assert message in capsys.readouterr().err
