"""Commands that other programs run beside or inside a measurement, each with a time limit.

A command is ended with all its children when its time is up, also where the process that started it has
been killed meanwhile: it runs under coreutils' `timeout`, in a process group of its own.
"""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

DEADLINE = "DANLU_DEADLINE"  # Unix time at which everything has to be over


class Command:
    """One that runs."""

    def __init__(
        self, command: Sequence[str | Path], seconds: float, capture: bool = True, **env: str
    ) -> None:
        seconds = max(0.1, min(seconds, seconds_left()))
        self._ends = time.monotonic() + seconds
        # a file, since a pipe that nobody reads would stop the command
        self._output = tempfile.TemporaryFile("w+", errors="replace") if capture else None  # noqa: SIM115
        self._process = subprocess.Popen(
            ["timeout", "--signal=KILL", f"{seconds + 1:.1f}", *map(str, command)],
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT if capture else None,
            env={**os.environ, **env},
        )

    def finish(self, seconds: float | None = None) -> tuple[int | None, str]:
        """Waits for its end, at most so long; exit status, None if the time was up, and output."""
        left = self._ends - time.monotonic()
        status: int | None
        try:
            status = self._process.wait(max(0.0, left if seconds is None else min(seconds, left)))
        except subprocess.TimeoutExpired:
            status = None
            self.stop()
        except BaseException:
            self.stop()
            raise
        if self._output is None:
            return status, ""
        with self._output:
            self._output.seek(0)
            return status, self._output.read()

    def stop(self) -> None:
        """Ends it with all its children."""
        try:
            os.killpg(self._process.pid, signal.SIGKILL)  # `timeout` leads a group
        except ProcessLookupError:  # not yet, or no longer
            self._process.kill()
        self._process.wait()


def limited(
    command: Sequence[str | Path], seconds: float, capture: bool = True, **env: str
) -> tuple[int | None, str]:
    """Exit status, None if the time was up, and output of a command."""
    return Command(command, seconds, capture, **env).finish()


def seconds_left() -> float:
    """Until everything has to be over."""
    return float(os.environ.get(DEADLINE, "inf")) - time.time()
