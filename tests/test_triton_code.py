"""What Triton makes of its kernels for GPUs of several kinds: wide accesses, no spills, no contraction."""

from __future__ import annotations

import os
import re
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from cases import BF16, CASES, F16, F32, STORAGES, Case, Storage
from danlu.backends import triton as backend
from danlu.triton_kernels import engine
from danlu.triton_kernels.rules import RULES
from machine_code import GENERIC, LOCAL, functions

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

assert not os.environ.get("TRITON_INTERPRET"), "kernels are compiled in this process"

NVIDIA = [GPUTarget("cuda", capability, 32) for capability in (80, 90, 100, 120)]
AMD = GPUTarget("hip", "gfx942", 64)
HOPPER = NVIDIA[1]
KINDS = {F32: tl.float32, BF16: tl.bfloat16, F16: tl.float16}
POINTERS = {
    "table": "*i64",
    "sizes": "*i64",
    "chunk_tensors": "*i32",
    "chunk_indices": "*i32",
    "rows": "*fp32",
    "clip": "*fp32",
    "found_inf": "*fp32",
}
CONSTANTS = ("RULE", "DTYPES", "COEFFICIENTS", "BLOCK", "CHUNK")
TWO_STATES = {"adamw", "adam", "adaxw", "adax", "adaxw_inside", "adax_inside"}
MIXED = Storage(BF16, BF16, F32)


def dtypes_of(rule: str, storage: Storage) -> list[torch.dtype]:
    return [storage.param, storage.grad, storage.moment, *([F32] if rule in TWO_STATES else [])]


@cache
def compiled(rule: str, storage: Storage, target: GPUTarget) -> Any:
    dtypes = dtypes_of(rule, storage)
    names = tuple(str(dtype).removeprefix("torch.") for dtype in dtypes)
    constants = dict(
        RULE=RULES[rule].function,
        DTYPES=tuple(KINDS[dtype] for dtype in dtypes),
        COEFFICIENTS=len(RULES[rule].coefficients),
        BLOCK=engine.block_size(names, target.warp_size),
        CHUNK=engine.CHUNK_SIZE,
    )
    signature = {**POINTERS, "tensors": "i32", "row_stride": "i32", **dict.fromkeys(CONSTANTS, "constexpr")}
    aligned: dict[tuple[int, ...], Any] = {(i,): [["tt.divisibility", 16]] for i in range(len(POINTERS))}
    source = ASTSource(fn=engine.step_kernel, signature=signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=target, options=engine.OPTIONS)


def combinations() -> list[Any]:
    """Every rule, every storage, every target, though not all of each with all of the others."""
    some = [(rule, Storage(F32, F32, F32), HOPPER) for rule in RULES]
    some += [(rule, storage, HOPPER) for rule in ("lion", "adamw") for storage in STORAGES]
    some += [
        (rule, storage, target)
        for rule in ("lion", "adamw")
        for storage in (STORAGES[0], STORAGES[3], MIXED)
        for target in NVIDIA
    ]
    return [
        pytest.param(rule, storage, target, id=f"{rule}-{storage.id}-sm{target.arch}")
        for rule, storage, target in dict.fromkeys(some)
    ]


@pytest.mark.parametrize(("rule", "storage", "target"), combinations())
def test_machine_code(rule: str, storage: Storage, target: GPUTarget, tmp_path: Path) -> None:
    kernel = compiled(rule, storage, target)
    ptx = kernel.asm["ptx"]
    assert not re.findall(r"\bfma\.|\bmad\.\w*f32|\.ftz|\.approx|\bdiv\.full", ptx)
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    (function,) = functions(cubin)
    assert (function.stack, function.local) == (0, 0)
    assert function.registers <= 64
    assert not {op for _, op, _ in function.accesses} & {*LOCAL, *GENERIC}

    dtypes = dtypes_of(rule, storage)
    narrowest = 128 if len({dtype.itemsize for dtype in dtypes}) == 1 else 64
    turns = [function.within(loop) for loop in function.loops]
    wide = [found for found in turns if found and min(bits for _, bits in found) > 32]
    assert wide
    hot = min(wide, key=Counter.total)  # beside it there may be an unrolled copy
    assert all(bits >= narrowest for _, bits in hot)
    loads, stores = (sum(n for (kind, _), n in hot.items() if kind == op) for op in ("LDG", "STG"))
    assert loads * (len(dtypes) - 1) == stores * len(dtypes)  # all but the gradient are stored


@pytest.mark.parametrize("storage", [STORAGES[0], STORAGES[3], MIXED], ids=lambda s: s.id)
@pytest.mark.parametrize("rule", ["lion", "adamw"])
def test_code_for_amd(rule: str, storage: Storage) -> None:
    kernel = compiled(rule, storage, AMD)
    code, ir = kernel.asm["amdgcn"], kernel.asm["llir"]
    assert not re.search(r"\bscratch_(load|store)|ScratchSize: [1-9]", code)
    assert not re.search(r"llvm\.fmuladd|\bcontract\b|\bfast\b", ir)
    if rule == "lion":  # a division or a root is made of fused operations
        assert not re.search(r"\bv_(pk_)?fmac?_f", code)
    widths = Counter(re.findall(r"(?:global|buffer)_(load|store)_dwordx(\d)", code))
    wide = {4} if len({dtype.itemsize for dtype in dtypes_of(rule, storage)}) == 1 else {2, 4}
    assert {int(width) for kind, width in widths if kind == "store"} >= {max(wide)}
    assert {int(width) for _, width in widths} & wide


class Driver:
    """Stands for a Hopper GPU of which only the name is known."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return HOPPER


@pytest.mark.parametrize("case", [CASES[0], CASES[2], CASES[4]], ids=lambda c: c.id)
def test_nothing_is_compiled_again(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over steps with another lr and other addresses, and over numbers of tensors."""
    launches: list[Any] = []
    monkeypatch.setattr(backend.Triton, "device_types", ("cpu",))
    monkeypatch.setattr(backend.Triton, "unavailable", lambda self: None)
    monkeypatch.setattr(backend._Launch, "run", lambda self, *a: (launches.append(a), self.compile(*a)))
    monkeypatch.setattr(triton.runtime.driver, "_active", Driver())
    built: list[Any] = []
    assert engine.step_kernel.device_caches[0]  # the look makes `compile`
    compile_source = engine.step_kernel.compile
    monkeypatch.setattr(
        engine.step_kernel, "compile", lambda *a, **k: (built.append(a), compile_source(*a, **k))[1]
    )
    for count in (1, 16, 17):
        params = [torch.nn.Parameter(torch.zeros(7 * i + 1)) for i in range(count)]
        params += [torch.nn.Parameter(torch.zeros(9 * i, dtype=BF16)) for i in range(count + 1)]
        opt = case.make([{"params": params[::2]}, {"params": params[1::2], "lr": 0.5}], backend="triton")
        for t in range(100 if count == 17 else 2):
            opt.param_groups[0]["lr"] = 1.0 / (t + 1)
            for p in params:
                p.grad = torch.ones_like(p)
            opt.step()
    assert len(launches) == 2 * (2 + 2 + 100)  # one for each kind of dtypes
    assert len(built) == 2
