"""Whether one engine gives the right numbers on this GPU: `python bench/gpu_smoke.py cuda` (or triton).

Steps of three rules in fp32 and bf16 and a captured graph against the bits of the `cpu` backend, two rules
that reduce against float64. Prints a line of JSON for each check as it is done. The exit status is 1 if one
was wrong, 3 if CUDA became unusable.
"""

from __future__ import annotations

import functools
import json
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

import danlu
from danlu.backends import BACKENDS

SHAPES = [(33, 65), (7,), (300, 1032), (16391,)]
STEPS = 2
BOUND = 1e-6  # of a tensor's norm, for rules that reduce
SHOWN = 3  # numbers that differ
UNUSABLE = 3

Make = Callable[..., torch.optim.Optimizer]
ELEMENTWISE: dict[str, Make] = {"lion": danlu.Lion, "adamw": danlu.AdamW, "adax": danlu.AdaX}
REDUCING: dict[str, Make] = {
    "lamb": functools.partial(danlu.LAMB, lr=0.1),
    "adafactor": functools.partial(danlu.Adafactor, preset="torch", lr=0.1),
}
DTYPES = (torch.float32, torch.bfloat16)
INTEGERS = {2: torch.int16, 4: torch.int32}


def main(arguments: Sequence[str]) -> int:
    (backend,) = arguments
    status = 0
    for found in checks(backend):
        print(json.dumps(found), flush=True)
        if found.get("unusable"):
            return UNUSABLE
        status |= not found["right"]
    return status


def checks(backend: str, device: str = "cuda") -> Iterator[dict[str, Any]]:
    """What becomes of each: its name, whether it was right, and differences or the error if not."""
    all_checks: dict[str, Callable[[], list[str]]] = {}
    for name, make in ELEMENTWISE.items():
        for dtype in DTYPES:
            step = functools.partial(bits, make, dtype, backend, device)
            all_checks[f"{name} {str(dtype).removeprefix('torch.')}"] = step
    all_checks["lion in a graph"] = functools.partial(graph, backend, device)
    for name, make in REDUCING.items():
        all_checks[name] = functools.partial(near_float64, make, backend, device)
    for name, check in all_checks.items():
        found: dict[str, Any] = {"check": name, "right": False}
        try:
            differences = check()
            found.update(right=not differences, differences=differences)
        except Exception:
            found["error"] = traceback.format_exc()[-2000:]
            found["unusable"] = device == "cuda" and not usable()
        if name in REDUCING and backend == "cuda" and not found["right"] and not found.get("unusable"):
            found["right_without_overlap"] = _right_without_overlap(check)
        yield found
        if found.get("unusable"):
            return


def _right_without_overlap(check: Callable[[], list[str]]) -> bool:
    """Whether the rule is right where its passes do not start early."""
    cuda: Any = BACKENDS["cuda"]
    cuda.dependent_launches = False
    try:
        return not check()
    except Exception:
        return False


def bits(make: Make, dtype: torch.dtype, backend: str, device: str) -> list[str]:
    """Where steps differ from those of the `cpu` backend."""
    got, want = (
        stepped(make, dtype, where, backend=by, state_dtype=dtype)
        for by, where in ((backend, device), ("cpu", "cpu"))
    )
    return [line for name in want for line in unequal(name, got[name], want[name])]


def graph(backend: str, device: str) -> list[str]:
    """A step that is captured and replayed, after two that are not."""
    from gpu_graphs import captured

    model = Given(torch.float32, device)
    optimizer, recorded = captured(functools.partial(danlu.Lion, backend=backend), model)
    recorded.replay()
    want = stepped(danlu.Lion, torch.float32, "cpu", steps=STEPS + 1, backend="cpu")
    got = everything(optimizer, model)
    return [line for name in want for line in unequal(name, got[name], want[name])]


def near_float64(make: Make, backend: str, device: str) -> list[str]:
    got = stepped(make, torch.float32, device, backend=backend)
    want = stepped(make, torch.float64, "cpu", backend="reference")
    found = []
    for name, exact in want.items():
        error = ((got[name].double() - exact).norm() / exact.norm().clamp(min=1e-30)).item()
        if not error <= BOUND:  # NaN, too
            found.append(f"{name}: {error:.2e} of its norm off, at most {BOUND:.0e} is right")
    return found


class Given:
    """Parameters with gradients, the same numbers for every device and dtype."""

    def __init__(self, dtype: torch.dtype, device: str) -> None:
        generator = torch.Generator().manual_seed(0)

        def normal(shape: tuple[int, ...], scale: float) -> torch.Tensor:
            exact = (scale * torch.randn(shape, generator=generator)).bfloat16()
            return exact.to(device, dtype)

        self.parameters = [torch.nn.Parameter(normal(shape, 0.1)) for shape in SHAPES]
        for p in self.parameters:
            p.grad = normal(tuple(p.shape), 1e-2)


def stepped(
    make: Make, dtype: torch.dtype, device: str, steps: int = STEPS, **options: Any
) -> dict[str, torch.Tensor]:
    model = Given(dtype, device)
    optimizer = make(model.parameters, **options)
    for _ in range(steps):
        optimizer.step()
    if isinstance(optimizer, danlu.FusedOptimizer):
        taken = {row.backend for row in optimizer.backend_report()}
        if taken != {options["backend"]}:
            raise RuntimeError(f"asked for backend {options['backend']}, took {taken}")
    return everything(optimizer, model)


def everything(optimizer: torch.optim.Optimizer, model: Given) -> dict[str, torch.Tensor]:
    """Parameters and states, on the CPU."""
    found = {}
    for i, p in enumerate(model.parameters):
        found[f"parameter {i}"] = p.detach().cpu()
        for name, value in optimizer.state[p].items():
            if name != "step":
                found[f"{name} {i}"] = value.cpu()
    return found


def unequal(name: str, got: torch.Tensor, want: torch.Tensor) -> list[str]:
    """A line if bits differ."""
    if (got.dtype, got.shape) != (want.dtype, want.shape):
        return [f"{name}: {got.dtype} {tuple(got.shape)}, wanted {want.dtype} {tuple(want.shape)}"]
    a, b = (x.contiguous().flatten().view(INTEGERS[x.element_size()]) for x in (got, want))
    both_nan = got.flatten().isnan() & want.flatten().isnan()
    at = ((a != b) & ~both_nan).nonzero().flatten()
    if not len(at):
        return []
    mask = (1 << 8 * got.element_size()) - 1
    some = [f"[{i}] {a[i].item() & mask:#x} for {b[i].item() & mask:#x}" for i in at[:SHOWN].tolist()]
    return [f"{name}: {len(at)} of {len(a)} differ: {', '.join(some)}"]


def usable() -> bool:
    try:
        torch.cuda.synchronize()
        torch.ones(1, device="cuda").add_(1).item()
    except Exception:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
