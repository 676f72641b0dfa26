"""Single modules of the libraries in requirements-oracles.txt, whose packages cannot be imported."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from unittest.mock import MagicMock

ORACLES = Path(sys.prefix) / "oracles"


def load(name: str, stubs: Sequence[str] = ()) -> ModuleType:
    """Imports the module without running the packages around it; `stubs` are modules that it names in vain.

    sys.modules is as before, but for the module itself.
    """
    packages = name.split(".")[:-1]
    before = dict(sys.modules)
    try:
        for depth in range(len(packages)):
            parent = ModuleType(".".join(packages[: depth + 1]))
            parent.__path__ = [str(ORACLES.joinpath(*packages[: depth + 1]))]
            sys.modules[parent.__name__] = parent
        for stub in stubs:
            sys.modules[stub] = MagicMock()
        return importlib.import_module(name)
    finally:
        sys.modules.clear()
        sys.modules.update(before)
