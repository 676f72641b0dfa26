"""The option of every benchmark that says where its results go."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def add_out_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out",
        metavar="DIR",
        type=Path,
        default=os.environ.get("DANLU_OUT", ROOT / "bench" / "results"),
        help="where the results go (default: $DANLU_OUT, else bench/results)",
    )
