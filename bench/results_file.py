"""Reads what benchmarks have measured, under the names that this version and older ones gave to figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read(path: Path) -> dict[str, Any]:
    """The figures in a file. Older ones say `stream` where newer ones say `ceiling`."""
    found: dict[str, Any] = json.loads(path.read_text(), object_hook=_renamed)
    return found


def _renamed(figures: dict[str, Any]) -> dict[str, Any]:
    return {
        name.replace("share_of_stream", "share_of_ceiling").replace("stream_GB", "ceiling_GB"): value
        for name, value in figures.items()
    }
