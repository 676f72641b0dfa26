"""Fixtures of the tests that need an NVIDIA GPU: `make gpu` runs them.

DANLU_GPU_TESTS=emulated runs those that need no more than the kernels over CPU tensors, in the emulator.
"""

from __future__ import annotations

import os

import pytest
import torch

from danlu.backends import BACKENDS

EMULATED = os.environ.get("DANLU_GPU_TESTS") == "emulated"


def pytest_sessionstart(session: pytest.Session) -> None:
    """Passing because there is no GPU would prove nothing."""
    if EMULATED:
        from emulated import emulated

        BACKENDS["cuda"] = emulated()
        return
    reason = BACKENDS["cuda"].unavailable()
    if reason:
        pytest.exit(f"backend cuda: {reason}", returncode=3)


@pytest.fixture(params=["cuda", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "triton":
        reason = "needs a GPU" if EMULATED else BACKENDS["triton"].unavailable()
        if reason:
            pytest.skip(reason)
    return str(request.param)


@pytest.fixture
def device() -> torch.device:
    """Where the tensors are."""
    return torch.device("cpu" if EMULATED else "cuda")


@pytest.fixture
def gpu() -> torch.device:
    """For what the emulator has not: streams, graphs, memory."""
    if EMULATED:
        pytest.skip("needs a GPU")
    return torch.device("cuda")
