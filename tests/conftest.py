"""Fixtures that several test files share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import danlu
from danlu.backends.cpu import CPU

torch.set_num_threads(2)


@pytest.fixture(autouse=True)
def _same_threads() -> Iterator[None]:
    """Puts torch's thread count back after tests that change it."""
    threads = torch.get_num_threads()
    yield
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


@pytest.fixture(params=["cpu", "reference"])
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(autouse=True)
def _doctest_names(doctest_namespace: dict[str, object]) -> None:
    doctest_namespace.update(danlu=danlu, torch=torch)


def pytest_sessionstart(session: pytest.Session) -> None:
    """A suite without the native kernels would prove nothing; it must not pass by skipping them."""
    reason = CPU.unavailable()
    if reason:
        pytest.exit(f"{reason}; build danlu before its tests", returncode=3)
