"""What the plots of step times say: linear axes, the fastest first, names as users write them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

import results_file
import step_plots
from contenders import ON_CPU, ON_CUDA

RESULTS = Path(__file__).resolve().parent.parent / "bench" / "results"


def spread(median: float) -> dict[str, float]:
    return {"median": median, "low": 0.9 * median, "high": 1.25 * median}


def row(name: str, ms: float, baseline: float | None = 10.0) -> dict[str, Any]:
    ratio = None if baseline is None else spread(baseline / ms)
    of_row = {"name": name, "ms": spread(ms), "ratio": ratio, "share_of_ceiling": spread(0.5)}
    return {**of_row, "state_bytes_per_parameter": 2.0 if name.endswith("bf16") else 4.0}


ROWS = [
    row("torch-adamw-foreach", 90.0),
    row("torch-adamw", 10.0),
    row("torch-adamw-bf16", 8.0),
    row("lion", 20.0),
    row("lion-bf16", 5.0),
    {"name": "adam", "failed": "left out"},
]
ENVIRONMENT = {"device": "a machine", "threads": 2, "torch": "2"}


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Those that are saved."""
    saved: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: saved.append(figure))
    return saved


def test_names_are_those_of_users() -> None:
    for contenders in (ON_CPU, ON_CUDA):
        titles = [contender.title for contender in contenders]
        assert len(set(titles)) == len(titles)
        assert all(title.startswith(("danlu.", "torch.optim.", "Lion in plain torch")) for title in titles)


def test_times(figures: list[Figure]) -> None:
    step_plots.times([{"title": "some tensors", "contenders": ROWS}], ENVIRONMENT, Path("x.png"))
    (panel,) = figures[0].axes
    assert panel.get_xscale() == "linear"
    names = [text.get_text() for text in panel.get_yticklabels()][::-1]
    # foreach is slower than fused and so not torch's best
    assert names == [
        "danlu.Lion (bf16)",
        "torch.optim.AdamW (fused, bf16)",
        "torch.optim.AdamW (fused)",
        "danlu.Lion",
    ]
    bars = panel.patches[::-1]
    assert [bar.get_width() for bar in bars] == pytest.approx([0.5, 0.8, 1.0, 2.0])
    assert [text.get_text() for text in panel.texts][::-1] == ["0.50", "0.80", "1.00", "2.00"]
    colors = [bar.get_facecolor() for bar in bars]
    assert colors[0] == colors[3] != colors[1] == colors[2]
    (ticks,) = (line for line in panel.lines if line.get_marker() == "|")
    assert list(ticks.get_xdata())[::-1] == pytest.approx([0.25, 0.4, 0.5, 1.0])
    low, high = panel.collections[0].get_segments()[-1][:, 0]
    assert (low, high) == pytest.approx((0.5 / 1.25, 0.5 / 0.9))


def test_files_of_older_versions(tmp_path: Path) -> None:
    """They call the bandwidth ceiling a stream."""
    rows = [{"stream_GB_per_s": {"median": 9}, "kernel_share_of_stream": 0.5, "name": "stream"}]
    (tmp_path / "old.json").write_text(json.dumps({"contenders": rows, "share_of_stream": [1.0]}))
    assert results_file.read(tmp_path / "old.json") == {
        "contenders": [{"ceiling_GB_per_s": {"median": 9}, "kernel_share_of_ceiling": 0.5, "name": "stream"}],
        "share_of_ceiling": [1.0],
    }


def test_times_without_the_baseline(figures: list[Figure]) -> None:
    rows = [row("lion", 20.0, None), row("lion-bf16", 5.0, None)]
    step_plots.times([{"title": "", "contenders": rows}], ENVIRONMENT, Path("x.png"))
    assert figures[0].axes[0].get_xlabel().startswith("ms a step")
    assert [bar.get_width() for bar in figures[0].axes[0].patches] == [20.0, 5.0]


def test_memory(figures: list[Figure]) -> None:
    step_plots.memory({"title": "some tensors", "contenders": ROWS}, ENVIRONMENT, Path("x.png"))
    (panel,) = figures[0].axes
    names = [text.get_text() for text in panel.get_yticklabels()][::-1]
    assert set(names[:2]) == {"danlu.Lion (bf16)", "torch.optim.AdamW (bf16)"}
    assert set(names[2:]) == {"danlu.Lion", "torch.optim.AdamW"}
    assert [text.get_text() for text in panel.texts][::-1] == ["6", "6", "12", "12"]
    weights = panel.patches[: len(names)]
    assert [bar.get_width() for bar in weights][::-1] == [2.0, 2.0, 4.0, 4.0]


def test_committed_results_can_be_drawn(tmp_path: Path) -> None:
    results = json.loads((RESULTS / "step_time.json").read_text())
    drawn = step_plots.draw(results, tmp_path / "step_time.png")
    assert {path.name for path in tmp_path.iterdir()} == set(drawn)
    assert set(drawn) <= {path.name for path in RESULTS.iterdir()}
