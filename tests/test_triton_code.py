"""What Triton makes of its kernels for GPUs of several kinds: wide accesses, no spills, no contraction."""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from cases import BF16, CASES, F16, F32, STORAGES, Case, Storage
from danlu.backends import triton as backend
from danlu.backends import triton_reduce
from danlu.triton_kernels import engine, norm
from danlu.triton_kernels.formats import FORMATS
from danlu.triton_kernels.reduce import KERNELS
from danlu.triton_kernels.reduce.sum_parts import sum_parts
from danlu.triton_kernels.reduce.work_item import NUMBERS
from danlu.triton_kernels.rules import RULES
from layouts import Layout
from listed_rules import ELEMENT_WISE
from machine_code.executed import Executor
from machine_code.listing import GENERIC, LOCAL, Function, functions
from reductions import CASE
from runs import run

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

assert not os.environ.get("TRITON_INTERPRET"), "kernels are compiled in this process"

NVIDIA = [GPUTarget("cuda", capability, 32) for capability in (80, 90, 100, 120)]
AMD = GPUTarget("hip", "gfx942", 64)
HOPPER = NVIDIA[1]
POINTERS = {
    "table": "*i64",
    "sizes": "*i64",
    "chunk_tensors": "*i32",
    "chunk_indices": "*i32",
    "coefficient_table": "*fp32",
    "clip": "*fp32",
    "found_inf": "*fp32",
}
CONSTANTS = ("RULE", "OUTCOME", "FORMATS", "COEFFICIENTS", "BLOCK", "CHUNK")
TWO_STATES = {"adamw", "adam", "adaxw", "adax", "adaxw_inside", "adax_inside"}
MIXED = Storage(BF16, BF16, F32)
# how many are read and written where that is not all, and all but the gradient
ARRAYS = {"accumulate": (2, 1), "average": (2, 1), "lookahead": (2, 2)}


def dtypes_of(rule: str, storage: Storage) -> list[torch.dtype]:
    if rule.startswith("amos"):  # two averages, fp32 like all, and a momentum behind them
        return [
            storage.param,
            storage.grad,
            F32,
            F32,
            *([storage.moment] if rule.endswith("momentum") else []),
        ]
    return [storage.param, storage.grad, storage.moment, *([F32] if rule in TWO_STATES else [])]


@cache
def compiled(rule: str, storage: Storage, target: GPUTarget) -> Any:
    dtypes = dtypes_of(rule, storage)
    names = tuple(str(dtype).removeprefix("torch.") for dtype in dtypes)
    constants = dict(
        RULE=RULES[rule].function,
        OUTCOME=RULES[rule].outcome,
        FORMATS=tuple(FORMATS[name] for name in names),
        COEFFICIENTS=len(RULES[rule].coefficients),
        BLOCK=engine.block_size(names, target.warp_size),
        CHUNK=engine.CHUNK_SIZE,
    )
    signature = {**POINTERS, "tensors": "i32", "stride": "i32", **dict.fromkeys(CONSTANTS, "constexpr")}
    return compiled_for(engine.apply_kernel, signature, constants, target, dict(engine.OPTIONS))


def combinations() -> list[Any]:
    """Every rule, every storage, every target, though not all of each with all of the others."""
    some = [(rule.name, Storage(F32, F32, F32), HOPPER) for rule in ELEMENT_WISE]
    some += [(rule, storage, HOPPER) for rule in ("lion", "adamw") for storage in STORAGES]
    some += [
        (rule, storage, target)
        for rule in ("lion", "adamw")
        for storage in (STORAGES[0], STORAGES[3], MIXED)
        for target in NVIDIA
    ]
    return [param(*combination) for combination in dict.fromkeys(some)]


def is_like_another(rule: str) -> bool:
    """Its passes are those of another rule around another formula, or have less to do."""
    return rule.startswith("layer_") or rule in {
        *("adam", "adax", "adax_inside", "adaxw", "adafactor_factored_momentum", "adafactor_factored_root"),
        *("adafactor", "adafactor_momentum", "amos_elementwise", "amos_rows", "amos_columns"),
    }


def param(rule: str, storage: Storage, target: GPUTarget) -> Any:
    """Without --all those that steps are executed with, and one rule in the other formats."""
    formats = storage == STORAGES[0] or (rule in ("adamw", "lamb") and storage in (MIXED, STORAGES[3]))
    always = target == HOPPER and formats and not is_like_another(rule)
    marks = () if always else pytest.mark.full
    return pytest.param(rule, storage, target, id=f"{rule}-{storage.id}-sm{target.arch}", marks=marks)


@pytest.mark.parametrize(("rule", "storage", "target"), combinations())
def test_machine_code(rule: str, storage: Storage, target: GPUTarget, tmp_path: Path) -> None:
    kernel = compiled(rule, storage, target)
    ptx = kernel.asm["ptx"]
    assert not re.findall(r"\bfma\.|\bmad\.\w*f32|\.ftz|\.approx|\bdiv\.full", ptx)
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    (function,) = functions(cubin)
    assert (function.stack, function.local) == (0, 0)
    dtypes = dtypes_of(rule, storage)
    assert function.registers <= (64 if len(dtypes) <= 4 else 80)
    assert not {op for _, op, _ in function.accesses} & {*LOCAL, *GENERIC}

    narrowest = 128 if len({dtype.itemsize for dtype in dtypes}) == 1 else 64
    turns = [function.within(loop) for loop in function.loops]
    wide = [found for found in turns if found and min(bits for _, bits in found) > 32]
    assert wide
    hot = min(wide, key=Counter.total)  # beside it there may be an unrolled copy
    assert all(bits >= narrowest for _, bits in hot)
    read, written = ARRAYS.get(rule, (len(dtypes), len(dtypes) - 1))
    # of the small rules the compiler makes a loop for either outcome of their condition
    proportions = [
        [sum(n for (kind, _), n in turn.items() if kind == op) for op in ("LDG", "STG")]
        for turn in (wide if rule in ARRAYS else [hot])
    ]
    assert any(loads * written == stores * read for loads, stores in proportions)


@pytest.mark.full
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


# rules that reduce

REDUCING = [name for name, rule in RULES.items() if rule.reduction is not None]
PASS_POINTERS = {
    **{"table": "*i64", "geometries": "*i64", "places": "*i32", "scratch": "*fp64"},
    **{"coefficient_table": "*fp32", "clip": "*fp32", "found_inf": "*fp32"},
}


def states_of(rule: str, storage: Storage) -> list[torch.dtype]:
    if rule == "lamb":
        return [storage.moment, F32]
    if rule.startswith(("tiger", "layer")):
        return dtypes_of(rule.removeprefix("layer_"), storage)[2:]
    full = [F32] if RULES[rule].reduction.along == "none" else [F32, F32]
    return full + [storage.moment] * rule.endswith("momentum")


def reduced_of(rule: str) -> int:
    """How many of the states are averages."""
    return 0 if RULES[rule].reduction.along == "none" else 2


def passes_of(rule: str) -> list[str]:
    reduction = RULES[rule].reduction
    if reduction.row_by_row:
        return ["apply_by_row"]
    statistics = ["reduce_gradient", "update_factors"] if reduction.along != "none" else []
    statistics += ["update_row_factors"] if reduction.along == "both" else []
    return [*statistics, *(["reduce_norms", "finalize"] if reduction.sums else []), "apply"]


@cache
def compiled_pass(rule: str, storage: Storage, target: GPUTarget, name: str, lanes: int = 32) -> Any:
    dtypes = [storage.param, storage.grad, *states_of(rule, storage)]
    names = [str(dtype).removeprefix("torch.") for dtype in dtypes]
    block = engine.block_size((*names[:2], *names[2 + reduced_of(rule) :]), target.warp_size)
    kept = tuple(FORMATS[name] for name in names)
    constants = triton_reduce.constants(RULES[rule], kept, block, dict(engine.OPTIONS))[name]
    options = {key: constants.pop(key) for key in (*engine.OPTIONS, "maxnreg") if key in constants}
    if target.backend == "hip":
        options.pop("maxnreg", None)
    if name == "reduce_gradient":
        constants["LANES"] = lanes
    kernel = KERNELS[name]
    signature = {
        **PASS_POINTERS,
        **dict.fromkeys(NUMBERS, "i32"),
        **dict.fromkeys(constants, "constexpr"),
    }
    return compiled_for(kernel, signature, constants, target, options)


def compiled_for(
    kernel: Any,
    signature: dict[str, str],
    constants: dict[str, Any],
    target: GPUTarget,
    options: dict[str, Any],
) -> Any:
    """As a launch compiles it, so that tests that launch it find it in Triton's cache."""
    attributes = {
        (i,): [["tt.divisibility", 16]] if kind.startswith("*") else []
        for i, kind in enumerate(signature.values())
        if kind != "i32"
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=target, options=options)


def hot_of_pass(rule: str, name: str, storage: Storage) -> Counter[tuple[str, int]]:
    """The accesses of a turn of `reduce_norms` or `apply`, for a thread's 4 or 8 elements."""
    elementwise = states_of(rule, storage)[reduced_of(rule) :]
    read = [storage.param, storage.grad, *elementwise]
    written = [storage.param, *elementwise]
    elements = 4 if F32 in read else 8
    if name == "reduce_norms":
        written = []
        if rule == "tiger_matrix":
            read = [storage.param]
        elif rule.startswith("adafactor") and rule.endswith("momentum"):
            read.pop()
    along = RULES[rule].reduction
    found = Counter(("LDG", 8 * elements * dtype.itemsize) for dtype in read)
    found += Counter(("STG", 8 * elements * dtype.itemsize) for dtype in written)
    found["LDG", 128] += along.column_factors * elements // 4
    found["LDG", 32] += along.row_factors * elements
    return +found


def some_passes() -> list[Any]:
    """Every rule in fp32, some in other formats and for other GPUs."""
    several = ["adafactor_factored", "adafactor_momentum", "lamb", "tiger_rows", "amos_rows", "amos_columns"]
    some = [(rule, Storage(F32, F32, F32), HOPPER) for rule in REDUCING]
    some += [(rule, storage, HOPPER) for rule in several for storage in (MIXED, STORAGES[3])]
    some += [(rule, MIXED, target) for rule in ("adafactor_factored", "lamb") for target in NVIDIA]
    return [param(*combination) for combination in dict.fromkeys(some)]


def function_of(kernel: Any, folder: Path) -> Function:
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    (function,) = functions(cubin)
    return function


@pytest.mark.parametrize(("rule", "storage", "target"), some_passes())
def test_machine_code_of_passes(rule: str, storage: Storage, target: GPUTarget, tmp_path: Path) -> None:
    for name in passes_of(rule):
        kernel = compiled_pass(rule, storage, target, name)
        ptx = kernel.asm["ptx"]
        assert not re.findall(r"\bfma\.|\bmad\.\w*f\d+|\.ftz|\.approx|\bdiv\.full|\b(?:atom|red)\.", ptx)
        function = function_of(kernel, tmp_path)
        assert (function.stack, function.local) == (0, 0), name
        if name != "update_factors":  # a small launch, whose threads have many sums on their way
            assert function.registers <= 128, name
        assert not {op for _, op, _ in function.accesses} & {*LOCAL, *GENERIC}
        turns = [found for loop in function.loops if (found := function.within(loop))]
        if name in ("reduce_norms", "apply"):
            want = hot_of_pass(rule, name, storage)
            # perhaps unrolled
            assert any(
                found == Counter({k: n * want[k] for k in want}) for found in turns for n in (1, 2, 4)
            ), name
        if name == "reduce_gradient":  # 16 elements of a thread
            assert any(found["LDG", 128] == storage.grad.itemsize for found in turns)
        if name == "apply_by_row":
            narrowest = 128 if len({d.itemsize for d in (storage.param, storage.moment)}) == 1 else 64
            assert any(min(bits for _, bits in found) >= narrowest for found in turns)


@pytest.mark.full
@pytest.mark.parametrize("lanes", [1, 2, 4, 8, 16])
def test_collect_of_narrow_matrices(lanes: int, tmp_path: Path) -> None:
    for rule in ("adafactor_factored", "amos_rows", "amos_columns"):
        for storage in (STORAGES[0], MIXED):
            function = function_of(compiled_pass(rule, storage, HOPPER, "reduce_gradient", lanes), tmp_path)
            assert (function.stack, function.local) == (0, 0)
            turns = [function.within(loop) for loop in function.loops]
            assert any(found["LDG", 128] == storage.grad.itemsize for found in turns)


@pytest.mark.full
@pytest.mark.parametrize("rule", ["adafactor_factored", "lamb", "tiger_rows", "amos_columns"])
def test_passes_for_amd(rule: str) -> None:
    for name in passes_of(rule):
        kernel = compiled_pass(rule, MIXED, AMD, name)
        assert not re.search(r"\bscratch_(load|store)|ScratchSize: [1-9]", kernel.asm["amdgcn"])
        assert not re.search(r"llvm\.fmuladd|\bcontract\b|\bfast\b", kernel.asm["llir"])


@pytest.mark.parametrize("dtype", [F32, BF16, pytest.param(F16, marks=pytest.mark.full)])
@pytest.mark.parametrize(
    "target",
    [
        pytest.param(target, id=f"sm{target.arch}", marks=() if target == HOPPER else pytest.mark.full)
        for target in NVIDIA
    ],
)
def test_the_norm_reads_wide(dtype: torch.dtype, target: GPUTarget, tmp_path: Path) -> None:
    name = str(dtype).removeprefix("torch.")
    block = engine.block_size((name,), target.warp_size)
    constants = dict(DTYPE=FORMATS[name].types[0], BLOCK=block, CHUNK=engine.CHUNK_SIZE)
    pointers = {"addresses": "*i64", "sizes": "*i64", "chunk_tensors": "*i32", "chunk_indices": "*i32"}
    signature = {**pointers, "sums": "*fp64", **dict.fromkeys(constants, "constexpr")}
    kernel = compiled_for(norm.squares, signature, constants, target, dict(engine.OPTIONS))
    function = function_of(kernel, tmp_path)
    assert (function.stack, function.local) == (0, 0)
    assert function.registers <= 64
    turns = [function.within(loop) for loop in function.loops]
    assert any(found and set(found) == {("LDG", 128)} for found in turns)
    signature = {
        "sums": "*fp64",
        "count": "i32",
        "max_norm": "*fp64",
        "grad_scale": "*fp32",
        "result": "*fp64",
    }
    last = function_of(compiled_for(norm.norm, signature, {}, target, dict(engine.OPTIONS)), tmp_path)
    assert (last.stack, last.local) == (0, 0)


@pytest.mark.parametrize("target", [HOPPER, pytest.param(AMD, marks=pytest.mark.full)], ids=["sm90", "amd"])
def test_sums_where_a_step_stops(target: GPUTarget, tmp_path: Path) -> None:
    """Eight parts on their way at once, of the scratch or of a state."""
    pointers = {"table": "*i64", "summations": "*i64", "places": "*i32", "scratch": "*fp64"}
    signature = {**pointers, **dict.fromkeys(("tensors", "blocks", "formats"), "i32")}
    kernel = compiled_for(sum_parts, signature, {}, target, dict(engine.OPTIONS))
    if target == AMD:
        assert not re.search(r"\bscratch_(load|store)|ScratchSize: [1-9]", kernel.asm["amdgcn"])
        return
    assert not re.findall(r"\bfma\.|\bmad\.\w*f\d+|\b(?:atom|red)\.", kernel.asm["ptx"])
    function = function_of(kernel, tmp_path)
    assert (function.stack, function.local) == (0, 0)
    assert not {op for _, op, _ in function.accesses} & {*LOCAL, *GENERIC}
    for bits in (64, 32):  # a thread has two lanes
        (turn,) = [loop for loop in function.loops if function.within(loop) == {("LDG", bits): 2 * 8}]
        opcodes = [op.partition(".")[0] for op in function.instructions[turn.start : turn.stop]]
        assert opcodes[: opcodes.index("DADD")].count("LDG") == 2 * 8


@pytest.mark.parametrize("executed", ["triton"], indirect=True)
def test_launches_find_these_kernels(executed: Executor, monkeypatch: pytest.MonkeyPatch) -> None:
    """In Triton's cache: what is looked at here is what a step runs, and is compiled once."""
    hits: list[bool] = []
    for name in passes_of("lamb"):
        compiled_pass("lamb", STORAGES[0], HOPPER, name)
        monkeypatch.setattr(KERNELS[name], "device_caches", defaultdict(KERNELS[name].create_binder))
    compiled("adamw", STORAGES[0], HOPPER)
    monkeypatch.setattr(engine.apply_kernel, "device_caches", defaultdict(engine.apply_kernel.create_binder))
    monkeypatch.setattr(triton.knobs.compilation, "listener", lambda **found: hits.append(found["cache_hit"]))
    for case in (CASE["lamb"], CASES[4]):
        run(case, STORAGES[0], "triton", wild=False, steps=1, layouts=[Layout("matrix", (33, 65))])
    assert hits == [True] * 4


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
    monkeypatch.setattr(backend, "load", lambda kernels, capturing: None)  # there is no device
    monkeypatch.setattr(backend._Launch, "run", lambda self, *a: (launches.append(a), self.compile(*a)))
    monkeypatch.setattr(triton.runtime.driver, "_active", Driver())
    built: list[Any] = []
    assert engine.apply_kernel.device_caches[0]  # the look makes `compile`
    compile_source = engine.apply_kernel.compile
    monkeypatch.setattr(
        engine.apply_kernel, "compile", lambda *a, **k: (built.append(a), compile_source(*a, **k))[1]
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
