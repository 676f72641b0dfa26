"""What nvcc makes of every CUDA kernel: whole sectors, no spills, no contraction. No GPU is needed."""

from __future__ import annotations

import functools
import re
from collections import Counter
from pathlib import Path

import pytest

import listed_rules
from cases import BF16, F16, F32, Storage
from machine_code import built, code, constants
from machine_code.listing import GENERIC, GLOBAL, Function, demangled, functions

ROOT = Path(__file__).resolve().parent.parent
ARCHITECTURES = (80, 90, 100)
WAITING = 90  # from which on passes have a PTX of their own, in which they wait for one another
LISTS = (31 * 1024, 4 * 1024)  # bytes of a launch's parameters
RULES = [rule.name for rule in listed_rules.ELEMENT_WISE]
ROOTED = {"adamw", "adam", "adaxw", "adax", "adaxw_inside", "adax_inside"}
# what is read and written around an optimizer's step
AROUND = {
    "accumulate": (("grad", "moment"), ("moment",)),
    "average": (("param", "moment"), ("moment",)),
    "lookahead": (("param", "moment"), ("param", "moment")),
}
SHAPE = re.search(r"DefaultShape = Shape<(\d+), (\d+), (\d+), ", (ROOT / "csrc/cuda/engine.cuh").read_text())
assert SHAPE
THREADS, ELEMENTS, BLOCKS = map(int, SHAPE.groups())
TYPES = {"danlu::F32": F32, "danlu::Bf16": BF16, "danlu::F16": F16}
ELEMENTS_OF_ARRAYS = {"float": F32, "danlu::bf16": BF16, "danlu::f16": F16}


def storage_of(formats: str) -> Storage:
    """From those of parameter, gradient and states, of which one at most is not fp32."""
    param, grad, *states = (TYPES[name.strip()] for name in formats.split(","))
    narrow = [dtype for dtype in states if dtype != F32]
    assert len(narrow) < 2
    return Storage(param, grad, *(narrow or [F32]))


# in the order in which CMake links them; rules that have few combinations share files
SOURCES = ["bandwidth_ceiling", "norm", "sum_parts", *RULES, *(rule.name for rule in listed_rules.REDUCING)]
TYPE = {rule.name: listed_rules.type_of(rule) for rule in listed_rules.ELEMENT_WISE + listed_rules.REDUCING}


every_architecture = pytest.mark.parametrize(
    "architecture",
    [
        pytest.param(a, id=f"sm{a}", marks=() if a == built.ARCHITECTURE else pytest.mark.full)
        for a in ARCHITECTURES
    ],
)


@pytest.fixture(scope="module", autouse=True)
def _library() -> None:
    built.library()


def is_of(rule: str, kernel: str) -> bool:
    """By a kernel's demangled name."""
    return bool(re.search(rf"_kernel<{re.escape(TYPE[rule])}[,> ]", kernel.replace("danlu::cuda::", "")))


@functools.cache
def _entries(module: str) -> dict[str, str]:
    """Texts of a module by demangled names of kernels; what lies before them by ""."""
    head, *entries = module.split(".entry ")
    names = demangled([entry[: entry.index("(")] for entry in entries])
    return {"": head, **{name: f".entry {text}" for name, text in zip(names, entries, strict=True)}}


def ptx(rule: str) -> str:
    """Of a rule, or of another file of csrc/cuda: as in the build, of the oldest architecture."""
    if rule not in TYPE:
        return str(code.modules(built.library())[SOURCES.index(rule)])
    found = [
        entries[""] + "".join(text for name, text in entries.items() if is_of(rule, name))
        for entries in map(_entries, code.modules(built.library()))
        if any(is_of(rule, name) for name in entries)
    ]
    (text,) = found
    return text


@functools.cache
def _functions(cubin: Path) -> dict[str, Function]:
    """By demangled names."""
    found = functions(cubin)
    return dict(zip(demangled([function.name for function in found]), found, strict=True))


@functools.cache
def compiled(source: str, architecture: int) -> list[Function]:
    """Of a rule, or of another file of csrc/cuda."""
    cubins = code.cubins(built.library(), architecture)
    if source not in TYPE:
        return [*_functions(cubins[SOURCES.index(source)]).values()]
    (file,) = (found for found in map(_functions, cubins) if any(is_of(source, name) for name in found))
    return [function for name, function in file.items() if is_of(source, name)]


@functools.cache
def kernels(rule: str, architecture: int) -> dict[tuple[str, int], Function]:
    """The kernels of a rule by the id of their storage formats and the bytes of their list."""
    found = compiled(rule, architecture)
    by_storage = {}
    for function, name in zip(found, demangled([f.name for f in found]), strict=True):
        formats, size = re.search(r"Formats<([^>]*)>", name), re.search(r"LaunchList<(\d+)>", name)
        assert formats, name
        assert size, name
        storage = storage_of(formats[1])
        by_storage[storage.id, int(size[1])] = function
    return by_storage


def itemsizes(rule: str, storage: Storage) -> dict[str, list[int]]:
    """Of the arrays that are loaded and of those that are stored."""
    if rule in AROUND:
        read, written = ([getattr(storage, name).itemsize for name in names] for names in AROUND[rule])
        return {"LDG": read, "STG": written}
    second = [F32] if rule in ROOTED else []
    stored = [dtype.itemsize for dtype in (storage.param, storage.moment, *second)]
    return {"LDG": [*stored, storage.grad.itemsize], "STG": stored}


def packs(sizes: list[int], width: int, elements: int = ELEMENTS) -> Counter[int]:
    """How many accesses of how many bits take the elements: of 16 bytes, or of all that a pack has."""
    counts: Counter[int] = Counter()
    for size in sizes:
        wide = min(16, width * size)
        counts[8 * wide] += elements * size // wide
    return counts


def width_of(sizes: list[int]) -> int:
    """Elements of a pack: the widest array has 16 bytes of them, so that lanes leave no gaps in any."""
    return 16 // max(sizes)


def hot_by_hand(rule: str, storage: Storage) -> Counter[tuple[str, int]]:
    """The accesses of one turn of the hot loop."""
    sizes = itemsizes(rule, storage)
    width = width_of([size for found in sizes.values() for size in found])
    return Counter(
        {(op, bits): n for op in GLOBAL for bits, n in packs(sizes[op], width).items()},
    )


def tail_by_hand(rule: str, storage: Storage) -> Counter[tuple[str, int]]:
    """The accesses of one turn of the tail, one for each array."""
    sizes = itemsizes(rule, storage)
    return Counter((op, 8 * size) for op in GLOBAL for size in sizes[op])


def _is_like_another(rule: str) -> bool:
    """Its passes are those of another rule around another formula, or have less to do."""
    layered = rule.startswith("layer_") and rule != "layer_adamw"
    return layered or rule in {
        *("adafactor_factored_momentum", "adafactor_factored_root", "adafactor", "amos_elementwise"),
        *("amos_rows", "amos_columns"),
    }


REDUCING = [rule.name for rule in listed_rules.REDUCING]
# how many arrays stand in the place of reduced states, of rows and of columns
ALONG = {"amos_rows": (2, 0), "amos_columns": (0, 2), "adafactor_factored": (1, 1)}
WITH_MOMENT = {
    name for name in REDUCING if name.endswith("_momentum") or not name.startswith(("ada", "amos"))
}


def along(rule: str) -> tuple[int, int]:
    return next((found for name, found in ALONG.items() if rule.startswith(name)), (0, 0))


def elementwise_states(rule: str, storage: Storage) -> list[int]:
    """Their sizes."""
    full = {"adafactor": [4], "amos_elementwise": [4, 4], "lamb": [4]}.get(rule.removesuffix("_momentum"), [])
    if rule.removeprefix("layer_") in ROOTED:
        full = [4]
    return full + [storage.moment.itemsize] * (rule in WITH_MOMENT)


@functools.cache
def passes(rule: str, architecture: int) -> dict[str, dict[str, Function]]:
    """The kernels of a rule that reduces: of each pass, by the id of its formats."""
    found = compiled(rule, architecture)
    by_pass: dict[str, dict[str, Function]] = {}
    for function, name in zip(found, demangled([f.name for f in found]), strict=True):
        kernel = re.search(r"(\w+)_kernel<", name)
        assert kernel, name
        key = ""
        if formats := re.search(r"Formats<([^>]*)>", name):
            key = storage_of(formats[1]).id
        elif kernel[1] == "reduce_gradient":
            key = name[name.rindex(",") + 1 : name.rindex(">")].strip()
        by_pass.setdefault(kernel[1], {})[key] = function
    return by_pass


def hot_of_pass(rule: str, kernel: str, storage: Storage) -> Counter[tuple[str, int]]:
    """The accesses of one turn."""
    p, g, moment = (dtype.itemsize for dtype in (storage.param, storage.grad, storage.moment))
    states = elementwise_states(rule, storage)
    width = width_of([p, g, *states])
    of_rows, of_columns = along(rule)
    read, written = [p, g, *states, *[4] * of_columns], [p, *states]
    if kernel == "reduce_norms":
        written = []
        if rule == "tiger_matrix":
            read = [p]
        elif rule.startswith("adafactor") and rule in WITH_MOMENT:
            read.remove(moment)
    elements = width if kernel == "apply_by_row" else ELEMENTS  # one pack a turn, or as many as have eight
    counts = Counter({("LDG", bits): n for bits, n in packs(read, width, elements).items()})
    counts += Counter({("STG", bits): n for bits, n in packs(written, width, elements).items()})
    return counts + Counter({("LDG", 32): of_rows * elements // width})  # one number stands for a pack's row


@every_architecture
@pytest.mark.parametrize(
    "rule",
    [pytest.param(rule, marks=pytest.mark.full if _is_like_another(rule) else ()) for rule in REDUCING],
)
def test_machine_code_of_passes(rule: str, architecture: int) -> None:
    found = passes(rule, architecture)
    wanted = {"apply_by_row"} if rule == "tiger_rows" else {"apply"}
    wanted |= {"reduce_gradient", "update_factors"} if any(along(rule)) else set()
    wanted |= {"update_row_factors"} if all(along(rule)) else set()
    wanted |= (
        {"reduce_norms", "finalize"}
        if rule.startswith(("lamb", "layer", "tiger_matrix", "adafactor"))
        else set()
    )
    assert set(found) == wanted
    for kernel in (kernel for kernels_of_pass in found.values() for kernel in kernels_of_pass.values()):
        assert (kernel.stack, kernel.local) == (0, 0)
        assert kernel.registers <= 128
        assert not {op for _, op, _ in kernel.accesses} & set(GENERIC)
        waits = [at for at, op in enumerate(kernel.instructions) if op == "ACQBULK"]
        assert len(waits) == kernel.instructions.count("PREEXIT") == (architecture >= WAITING)
        # before the wait found_inf, the tensor, the index and the row's number are read, and nothing else
        early = [(op, bits) for at, op, bits in kernel.accesses if waits and at < waits[0]]
        assert len(early) <= 4
        assert {op for op, _ in early} <= {"LDG"}
        assert all(bits <= 64 for _, bits in early)
    formats = [s for s in built.storages(rule) if rule in WITH_MOMENT or s.moment == F32]
    for name in {"apply", "reduce_norms", "apply_by_row"} & wanted:
        assert set(found[name]) == {s.id for s in formats}
        for storage in formats:
            kernel = found[name][storage.id]
            few = len(elementwise_states(rule, storage)) <= (1 if rule.startswith("amos") else 2)
            assert kernel.registers <= (80 if few else 128)
            assert kernel.hot_loop() == hot_of_pass(rule, name, storage), storage.id
    if "reduce_gradient" in wanted:
        gradients = {storage.grad for storage in formats}
        kinds = {kind: dtype for kind, dtype in ELEMENTS_OF_ARRAYS.items() if dtype in gradients}
        assert set(found["reduce_gradient"]) == set(kinds)
        for kind, dtype in kinds.items():
            # eight rows of eight columns, or those of seven that there are; one by one where not aligned
            rows = packs([dtype.itemsize], 16 // dtype.itemsize, (8 + 7) * 8)
            turn = Counter({("LDG", 128): rows[128], ("LDG", 8 * dtype.itemsize): 8})
            kernel = found["reduce_gradient"][kind]
            assert turn in [kernel.within(loop) for loop in kernel.loops]
            # three blocks on a multiprocessor, or two
            assert kernel.registers <= (80 if dtype == BF16 else 128)


@pytest.mark.parametrize("rule", REDUCING)
def test_no_contraction_in_passes(rule: str) -> None:
    text = ptx(rule)
    assert not re.findall(r"\bfma\.|\bmad\.\w*f\d+|\.ftz|\.approx", text)
    assert not re.findall(r"\b(atom|red)\.", text)


every_rule = pytest.mark.parametrize("rule", RULES)


@every_rule
def test_the_module_is_of_these_sources(rule: str) -> None:
    """Modules are found by their order; and objects may be older than their headers whatever dates say."""
    (struct,) = (listed.struct for listed in listed_rules.ELEMENT_WISE if listed.name == rule)
    names = re.findall(r"\.entry (\w+)\(", ptx(rule))
    assert len(names) == len(LISTS) * len(built.storages(rule))
    assert all(f"apply_kernelINS_4cuda{len(struct)}{struct}E" in name for name in names)
    sizes = re.findall(r"\.param \.align 8 \.b8 \w+\[(\d+)\]", ptx(rule))
    assert {*map(int, sizes)} == {*LISTS}
    assert f".target sm_{built.oldest()}\n" in ptx(rule)


@pytest.mark.full
def test_nothing_is_left_out() -> None:
    """What `make test` builds would do for itself: some architectures, few combinations of formats."""
    assert built.oldest() == min(ARCHITECTURES)
    assert built.combinations() == "all"
    for architecture in ARCHITECTURES:
        assert len(code.cubins(built.library(), architecture)) == len(SOURCES)


@every_architecture
@pytest.mark.parametrize(
    "source",
    [pytest.param(name, marks=pytest.mark.full if _is_like_another(name) else ()) for name in SOURCES],
)
def test_reads_of_parameters_go_where_they_should(source: str, architecture: int) -> None:
    for kernel in compiled(source, architecture):
        assert not constants.uncompensated(kernel.text), kernel.name


@every_architecture
@pytest.mark.parametrize(("rule", "storage"), built.every(RULES, built.COMPILED))
def test_machine_code(rule: str, storage: Storage, architecture: int) -> None:
    for size in LISTS:
        kernel = kernels(rule, architecture)[storage.id, size]
        assert (kernel.stack, kernel.local) == (0, 0)
        assert kernel.registers <= 65536 // (THREADS * BLOCKS)
        assert {op for _, op, _ in kernel.accesses} == set(GLOBAL)
        assert kernel.hot_loop() == hot_by_hand(rule, storage)
        assert tail_by_hand(rule, storage) in [kernel.within(loop) for loop in kernel.loops]


@every_architecture
@every_rule
def test_every_format_is_compiled(rule: str, architecture: int) -> None:
    assert set(kernels(rule, architecture)) == {(s.id, size) for s in built.storages(rule) for size in LISTS}


@every_rule
def test_no_contraction_and_no_flushing(rule: str) -> None:
    """In PTX, since the machine code of divisions and roots has fused operations of its own."""
    text = ptx(rule)
    assert not re.findall(r"\bfma\.|\bmad\.\w*f32|\.ftz|\.approx", text)
    assert bool(re.search(r"sqrt\.rn\.f32", text)) == (rule in ROOTED)
    assert bool(re.search(r"div\.rn\.f32", text)) == (rule in ROOTED)
    assert "mul.rn.f32" in text or "mul.f32" in text


@every_architecture
def test_the_bandwidth_ceiling_is_all_wide_accesses(architecture: int) -> None:
    for kernel in compiled("bandwidth_ceiling", architecture):
        assert (kernel.stack, kernel.local) == (0, 0)
        assert {op for _, op, _ in kernel.accesses} == set(GLOBAL)
        wide = Counter(op for _, op, bits in kernel.accesses if bits == 128)
        rest = Counter((op, bits) for _, op, bits in kernel.accesses if bits != 128)
        if "read_kernel" in kernel.name:
            assert wide == {"LDG": 4}
            assert rest == {("LDG", 32): 1, ("STG", 32): 1}
            continue
        written = int(re.search(r"ILi(\d)E", kernel.name)[1])  # type: ignore[index]
        assert wide == {"LDG": written + 1, "STG": written}
        # the values behind the last whole pack, for each written array
        assert rest == {("LDG", 32): 2 * written, ("STG", 32): written}


@every_architecture
def test_the_norm_reads_wide(architecture: int) -> None:
    found = compiled("norm", architecture)
    assert len(found) == 3 * len(LISTS) + 1  # squares of three dtypes, the factor
    for kernel, name in zip(found, demangled([f.name for f in found]), strict=True):
        assert (kernel.stack, kernel.local) == (0, 0)
        assert {op for _, op, _ in kernel.accesses} <= {*GLOBAL, "LDS", "STS"}
        if dtype := re.search(r"squares_kernel<([^,>]*),", name):
            # all the threads that a multiprocessor holds
            assert kernel.registers <= 32
            assert kernel.hot_loop() == {("LDG", 128): 4}
            one = {("LDG", 8 * ELEMENTS_OF_ARRAYS[dtype[1]].itemsize): 1}
            assert one in [kernel.within(loop) for loop in kernel.loops]
        else:
            assert kernel.hot_loop() == {("LDG", 64): 8}


@every_architecture
def test_sums_where_a_step_stops(architecture: int) -> None:
    """Eight parts on their way at once, of the scratch or of a state."""
    (kernel,) = compiled("sum_parts", architecture)
    assert (kernel.stack, kernel.local) == (0, 0)
    assert kernel.registers <= 80
    assert not {op for _, op, _ in kernel.accesses} & set(GENERIC)
    for bits in (64, 32):
        (turn,) = [loop for loop in kernel.loops if kernel.within(loop) == {("LDG", bits): 8}]
        opcodes = [op.partition(".")[0] for op in kernel.instructions[turn.start : turn.stop]]
        assert opcodes[: opcodes.index("DADD")].count("LDG") == 8
    assert not re.findall(r"\bfma\.|\bmad\.\w*f\d+|\b(?:atom|red)\.", ptx("sum_parts"))
