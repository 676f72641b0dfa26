"""What danlu can do on this machine: `python -m danlu.info [--json]`.

Exit status 1 if a self check fails: one step of every optimizer on every available backend against the
reference.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Sequence
from typing import Any

import torch

import danlu

from .backends import BACKENDS, NATIVE
from .backends.cpu import CPU, instruction_set
from .backends.cuda import CUDA
from .testing import same_bits

OPTIMIZERS = [
    danlu.Lion,
    danlu.Tiger,
    danlu.AdamW,
    danlu.Adam,
    danlu.AdaX,
    danlu.AdaXW,
    danlu.Adafactor,
    danlu.LAMB,
    danlu.Amos,
]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m danlu.info", description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    facts = collect()
    print(json.dumps(facts, indent=2) if parser.parse_args(arguments).json else as_text(facts))
    return 0 if all(check["ok"] for check in facts["self_check"]) else 1


def collect() -> dict[str, Any]:
    """Everything that is printed, as JSON-able values."""
    return {
        "versions": {
            "danlu": danlu.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "platform": f"{platform.system()} {platform.machine()}",
        "devices": ["cpu", *(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))],
        "backends": {name: backend.unavailable() or "available" for name, backend in BACKENDS.items()},
        "cpu": _cpu_facts(),
        "cuda": _cuda_facts(),
        "self_check": [_self_check(optimizer, name) for name in _available() for optimizer in OPTIMIZERS],
    }


def as_text(facts: dict[str, Any]) -> str:
    lines = [" ".join(f"{name} {version}" for name, version in facts["versions"].items())]
    lines += [f"platform: {facts['platform']}", f"devices: {', '.join(facts['devices'])}"]
    lines += [f"backend {name}: {state}" for name, state in facts["backends"].items()]
    for backend in ("cpu", "cuda"):
        lines += [f"{backend} {name}: {value}" for name, value in facts[backend].items()]
    for check in facts["self_check"]:
        lines.append(f"one step of {check['optimizer']} on {check['backend']}: {check['result']}")
    return "\n".join(lines)


def _cpu_facts() -> dict[str, Any]:
    if CPU.unavailable():
        return {}
    exchange = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    return {
        "instruction set": instruction_set(),
        "threads": torch.get_num_threads(),
        "reads tensors by": "Python attributes" if exchange is None else "DLPack's C exchange API",
    }


def _cuda_facts() -> dict[str, Any]:
    if CUDA.native is None:
        return {}
    return {"built for": CUDA.native.architectures, "combinations of formats": CUDA.native.combinations}


def _available() -> list[str]:
    return [backend.name for backend in NATIVE if not backend.unavailable()]


def _self_check(optimizer: type[danlu.FusedOptimizer], backend: str) -> dict[str, Any]:
    """One step from the same start with the backend and with the reference."""
    results = []
    for choice, device in ((backend, BACKENDS[backend].device_types[0]), ("reference", "cpu")):
        generator = torch.Generator().manual_seed(0)
        p = torch.nn.Parameter(torch.randn(1000, generator=generator).to(device))
        p.grad = torch.randn(1000, generator=generator).to(device)
        make: Any = optimizer
        make([p], lr=1e-3, backend=choice).step()
        results.append(p.detach().cpu())
    if optimizer.reduces is True:
        ok = torch.allclose(results[0], results[1], rtol=1e-6, atol=0.0)
        result = "within 1e-6 of the reference"
    else:
        ok = same_bits(*results)
        result = "same bits as the reference"
    result = result if ok else "DIFFERS from the reference"
    return {"optimizer": optimizer.__name__, "backend": backend, "ok": ok, "result": result}


if __name__ == "__main__":
    sys.exit(main())
