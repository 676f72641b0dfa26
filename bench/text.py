"""Real text that every machine has: the source of Python's own standard library, split by file."""

from __future__ import annotations

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

# what pip adds to the folder, and the tests, which some systems package apart
EXCLUDED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test"}

HELD_OUT_SHARE = 0.1

# stands between two files, and in no file
SEPARATOR = b"\0"


@dataclass(frozen=True)
class Corpus:
    """Two texts without a file in common, as 1-d uint8 tensors, and the SHA-256 of both."""

    train: torch.Tensor
    held_out: torch.Tensor
    digest: str


def load_corpus(root: Path | None = None) -> Corpus:
    """Reads every source file under `root`, by default this interpreter's standard library."""
    root = root or Path(sysconfig.get_path("stdlib"))
    texts: dict[bool, list[bytes]] = {False: [], True: []}
    for name in source_files(root):
        texts[is_held_out(name)].append((root / name).read_bytes())
    if not (texts[False] and texts[True]):
        raise RuntimeError(f"{root} must hold Python source files to train on, found too few")
    train, held_out = SEPARATOR.join(texts[False]), SEPARATOR.join(texts[True])
    digest = hashlib.sha256(train + 2 * SEPARATOR + held_out).hexdigest()
    return Corpus(_as_tensor(train), _as_tensor(held_out), digest)


def source_files(root: Path) -> list[str]:
    """The paths of the files to read, relative to `root`, with forward slashes, in a fixed order."""
    paths = (path.relative_to(root) for path in root.rglob("*.py") if path.is_file())
    return sorted(path.as_posix() for path in paths if not EXCLUDED_FOLDERS.intersection(path.parts))


def is_held_out(name: str) -> bool:
    """Depends on the file's relative path alone, so that other files may come and go."""
    first_bytes = hashlib.sha256(name.encode()).digest()[:8]
    return int.from_bytes(first_bytes, "big") < HELD_OUT_SHARE * 2**64


class Batches:
    """An endless, reproducible series of random windows: int64 of shape (batch, context + 1)."""

    def __init__(self, text: torch.Tensor, batch: int, context: int, seed: int) -> None:
        self.text = text
        self.batch = batch
        self.context = context
        self.generator = torch.Generator().manual_seed(seed)

    def next(self) -> torch.Tensor:
        starts = torch.randint(len(self.text) - self.context, (self.batch,), generator=self.generator)
        return windows(self.text, starts, self.context)

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.generator.set_state(state["generator"])


def even_windows(text: torch.Tensor, count: int, context: int) -> torch.Tensor:
    """`count` windows spread evenly over the text: int64 of shape (count, context + 1)."""
    starts = torch.linspace(0, len(text) - context - 1, count, dtype=torch.float64).long()
    return windows(text, starts, context)


def windows(text: torch.Tensor, starts: torch.Tensor, context: int) -> torch.Tensor:
    """The `context` bytes from each start, and the one to predict after them."""
    positions = starts[:, None] + torch.arange(context + 1)
    return text[positions.to(text.device)].long()


def _as_tensor(text: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)
