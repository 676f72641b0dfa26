"""How a step over CUDA tensors is cut into launches, and what happens when one fails."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

import danlu
from cases import BF16, CASES, Case, values
from danlu import capture
from danlu.backends.cuda import Cuda
from danlu.backends.gpu import GpuExecutor
from danlu.testing import same_bits
from emulated import STREAM, Emulated
from layouts import reserved
from lazy_runs import MODES
from training import all_same, copies, everything, give_gradients, parameters, some_params

ADAMW = CASES[4]
CHUNK = 16384
PARAMETER_BYTES = 31 * 1024  # of a launch
FEW_BYTES = 4 * 1024  # of a launch of few tensors
HEAD_BYTES = 32


def llama_8b() -> list[int]:
    """Elements of the 291 tensors of Llama-3-8B."""
    width, hidden, vocabulary, heads = 4096, 14336, 128256, 1024
    block = [width * width, heads * width, heads * width, width * width, *[hidden * width] * 3, width, width]
    return [vocabulary * width, *block * 32, width, vocabulary * width]


def planned(cuda: Emulated, sizes: Sequence[int], rows: Sequence[int], rule: str = "adamw") -> list[int]:
    """Tensors of each launch."""
    return [tensors for tensors, _ in cuda.native.launch_plan(rule, sizes, rows, False)]


def test_a_large_model_is_one_launch(cuda: Emulated) -> None:
    sizes = llama_8b()
    assert (len(sizes), sum(sizes)) == (291, 8_030_261_248)
    groups = [int(size > 4096) for size in sizes]  # with decay, and gains without
    for rule in ("lion", "adamw"):
        for rows, on_device in ((groups, False), (range(291), True)):
            ((tensors, blocks),) = cuda.native.launch_plan(rule, sizes, rows, on_device)
            assert tensors == 291
            assert blocks == sum(-(-size // CHUNK) for size in sizes)


def test_thousands_of_small_tensors_take_few_launches(cuda: Emulated) -> None:
    for rule in ("lion", "adamw"):
        assert len(planned(cuda, [5000] * 5000, [0] * 5000, rule)) <= 10
    assert sum(planned(cuda, [7] * 20_000, [0] * 20_000)) == 20_000


def test_what_fits_into_a_launch(cuda: Emulated) -> None:
    """As many tensors as the launch's parameters have room for, each with its pointers, and the rows."""
    for rule, states in (("lion", 1), ("tiger", 1), ("adamw", 2), ("adax", 2), ("adaxw_inside", 2)):
        row = 2 + len(cuda.native.coefficient_names(rule))
        for rows in ([0] * 3000, list(range(3000))):
            used = [n * (3 + states) + -(-row * len(set(rows[:n])) // 2) for n in range(1, 1300)]
            most = sum(words <= (PARAMETER_BYTES - HEAD_BYTES) // 8 for words in used)
            assert planned(cuda, [1] * 3000, rows, rule)[:2] == [most, most]
    assert planned(cuda, [1] * 1000, [0] * 1000)[0] >= 791
    assert planned(cuda, [1] * 1000, [0] * 408 + [1] * 592)[0] >= 790
    assert planned(cuda, [1] * 1000, list(range(1000)))[0] >= 396
    assert sum(planned(cuda, [1] * 1000, list(range(1000)))) == 1000
    # sm_90 reads parameters at offsets from c[0x0][0x210] on, which ptxas takes for signed numbers of 16 bits
    assert PARAMETER_BYTES + 0x210 <= 0x8000
    assert planned(cuda, [0, 0], [0, 0]) == []
    assert planned(cuda, [0, 5, 0, 0, 5, 0], [0] * 6) == [2]
    # an index into rows on the device has 16 bits
    assert planned(cuda, [1] * 3, [0, 65535, 65536]) == [3]
    assert [n for n, _ in cuda.native.launch_plan("adamw", [1] * 3, [0, 65535, 65536], True)] == [2, 1]


def test_sizes_beyond_32_bits(cuda: Emulated) -> None:
    for size in (2**31, 2**32 + 5, 2**40):
        assert cuda.native.launch_plan("lion", [size, 3], [0, 0], False) == [(2, -(-size // CHUNK) + 1)]


@pytest.mark.parametrize("extra", [None, 0, 1], ids=["none", "one launch", "one more tensor"])
@pytest.mark.parametrize("own_steps", [False, True], ids=["one row", "a row each"])
def test_same_bits_at_the_boundary_of_a_launch(own_steps: bool, extra: int | None, cuda: Emulated) -> None:
    rows = list(range(1000)) if own_steps else [0] * 1000
    count = 0 if extra is None else planned(cuda, [1] * 1000, rows)[0] + extra
    results = []
    for backend in ("cuda", "cpu"):
        # empty ones at the ends and between the others, so that only the rest counts
        sizes = [0, *[3] * (count // 2), 0, *[9] * (count - count // 2), 0]
        params = [torch.nn.Parameter(values((size,), i, wild=False)) for i, size in enumerate(sizes)]
        opt = ADAMW.make(params, backend=backend)
        give_gradients(params, 1)
        for i, p in enumerate(params):
            state = {"step": torch.tensor(float(i if own_steps else 5))}
            opt.state[p] = {**state, "exp_avg": torch.ones_like(p), "exp_avg_sq": torch.ones_like(p)}
        opt.step()
        assert [opt.state[p]["step"].item() for p in params] == [
            (i if own_steps else 5) + 1 for i in range(len(params))
        ]
        results.append(copies(opt))
    assert all_same(*results)
    launches = cuda.native.machine().launches
    assert [launch.blocks for launch in launches] == ([] if not count else [count - extra, 1][: 1 + extra])


def test_a_later_launch_has_its_own_rows_on_the_device(cuda: Emulated) -> None:
    """Whose numbers begin with those of its first tensor."""
    results = []
    for backend in ("cuda", "cpu"):
        params = [torch.nn.Parameter(values((3,), i, wild=False)) for i in range(1000)]
        groups = [{"params": params[i::10], "lr": 1e-3 * (1 + i)} for i in range(10)]
        opt = ADAMW.make(groups, backend=backend, capturable=True)
        give_gradients(params, 1)
        opt.step()
        results.append(copies(opt))
    assert all_same(*results)
    assert len(cuda.native.machine().launches) == 2


def most_in_few_bytes(states: int, row: int, own_rows: bool) -> int:
    """Tensors that fit into the shorter list."""
    words = [n * (3 + states) + -(-row * (n if own_rows else 1) // 2) for n in range(1, 300)]
    return sum(count <= (FEW_BYTES - HEAD_BYTES) // 8 for count in words)


def states_of(opt: danlu.FusedOptimizer) -> list[torch.Tensor]:
    return [value for p in parameters(opt) for name, value in opt.state[p].items() if name != "step"]


@pytest.mark.parametrize("rows", ["one", "each", "device"])
@pytest.mark.parametrize("cls", [danlu.Lion, danlu.AdamW], ids=lambda cls: cls.__name__)
def test_a_launch_of_few_tensors_copies_few_bytes(cls: Any, rows: str, cuda: Emulated) -> None:
    """The last tensor and its row are read from the right places of both lists."""
    names = cuda.native.coefficient_names(cls.__name__.lower())
    row = 0 if rows == "device" else 2 + len(names)
    most = most_in_few_bytes(1 if cls is danlu.Lion else 2, row, rows == "each")
    assert most >= (40 if rows == "each" else 90)
    for count, size in ((1, FEW_BYTES), (most, FEW_BYTES), (most + 1, PARAMETER_BYTES)):
        results = []
        for backend in ("cuda", "cpu"):
            params = [torch.nn.Parameter(values((1 + i % 9,), i, wild=False)) for i in range(count)]
            groups = [{"params": [p], "lr": 1e-3 * (1 + i)} for i, p in enumerate(params)]
            of = groups if rows == "each" else params
            opt = cls(of, lr=1e-3, backend=backend, capturable=rows == "device", weight_decay=0.1)
            give_gradients(params, 1)
            opt.step()
            results.append([*params, *states_of(opt)])
        assert all(map(same_bits, *results))
        (launch,) = cuda.native.machine().launches
        assert (launch.blocks, launch.parameter_bytes) == (count, size)
        cuda.native.reset()


@pytest.mark.parametrize("size", [2**31 + 3, 2**32 + CHUNK + 5], ids=["2^31", "2^32"])
def test_offsets_beyond_32_bits(size: int, cuda: Emulated) -> None:
    """Only the blocks around the places that a 32-bit offset would miss are run."""
    p = torch.nn.Parameter(reserved(size), requires_grad=False)
    g, m = reserved(size), reserved(size)
    opt = danlu.Lion([p], lr=0.5, backend="cuda", state_dtype=BF16)
    opt.state[p] = {"step": torch.zeros(()), "exp_avg": m}
    p.grad = g
    places = [0, CHUNK - 1, 2**31 - 1, 2**31 + 1, size - 1]
    if size > 2**32:
        places += [2**32 - 1, 2**32 + 1]
    for place in places:
        g[place] = 1.0
    for place in places:
        cuda.native.machine().first_block = place // CHUNK
        cuda.native.machine().end_block = place // CHUNK + 1
        before = p[place].item()
        opt.step()
        assert (before, p[place].item()) in ((0.0, -0.5), (-0.5, -1.0))
    assert p[5].item() == 0.0


def test_stream_and_device_are_those_of_the_tensors(cuda: Emulated) -> None:
    opt = ADAMW.make(some_params(), backend="cuda")
    give_gradients(parameters(opt), 0)
    cuda.native.machine().device_count = 2
    cuda.native.machine().device = 1
    opt.step()
    (launch,) = cuda.native.machine().launches
    assert (launch.stream, launch.device) == (STREAM, 0)
    assert cuda.native.machine().device == 1


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_a_launch_that_fails_changes_nothing(case: Case, cuda: Emulated) -> None:
    for capturable in (False, True):
        opt = case.make(some_params(), backend="cuda", capturable=capturable)
        other = case.make(some_params(), backend="cuda", capturable=capturable)
        for t in range(4):
            give_gradients(parameters(opt), t)
            give_gradients(parameters(other), t)
            if t == 2:
                before = copies(opt)
                cuda.native.machine().fail_launch = 0
                with pytest.raises(
                    RuntimeError, match=r"param_groups\[0\]\['params'\]\[0\]: .*no kernel image"
                ):
                    opt.step()
                assert all_same(everything(opt), before)
            opt.step()
            other.step()
        assert all_same(everything(opt), everything(other))


def test_a_later_launch_that_fails_says_so(cuda: Emulated) -> None:
    params = [torch.nn.Parameter(torch.ones(2)) for _ in range(900)]
    opt = ADAMW.make([{"params": [(f"layer{i}", p) for i, p in enumerate(params)]}], backend="cuda")
    give_gradients(params, 0)
    cuda.native.machine().fail_launch = 1
    first = planned(cuda, [2] * 900, [0] * 900)[0]
    with pytest.raises(RuntimeError, match=f"layer{first}: .*; earlier launches of this step have been made"):
        opt.step()


@pytest.mark.parametrize("written", [1, 2, 3])
@pytest.mark.parametrize("size", [0, 1, 3, 4, 1023, 4096, 5001])
def test_the_bandwidth_ceiling_adds_to_every_element(size: int, written: int, cuda: Emulated) -> None:
    arrays = [torch.full((size + 4,), float(i)) for i in range(written + 1)]
    addresses = [array.data_ptr() for array in arrays]
    read = torch.arange(size + 4, dtype=torch.float32)
    cuda.native.bandwidth_ceiling(addresses[:written], read.data_ptr(), size, 0, STREAM)
    for i, array in enumerate(arrays[:written]):
        assert torch.equal(array[:size], i + read[:size])
        assert torch.equal(array[size:], torch.full((4,), float(i)))


@pytest.mark.parametrize("size", [0, 1, 3, 4, 1023, 4096, 9001])
def test_reading_through_touches_every_element_once(size: int, cuda: Emulated) -> None:
    values = torch.ones(size + 4)
    values[size:] = float("nan")  # of no concern
    cuda.native.machine().count_traffic()
    cuda.native.read_through(values.data_ptr(), size, 0, STREAM)
    machine = cuda.native.machine()
    assert 4 * size <= machine.bytes_read <= 4 * size + 32
    assert machine.bytes_written == 0
    for at in range(0, size, 7):
        one = torch.ones(size + 4)
        one[at] = float("nan")
        cuda.native.read_through(one.data_ptr(), size, 0, STREAM)
        assert one[0].isnan()


@pytest.mark.parametrize(
    ("machine", "reason"),
    [
        (dict(driver_version=0), "no NVIDIA driver is installed"),
        (dict(driver_version=12020), r"too old: it supports CUDA 12\.2, danlu was built with 13\.0"),
        (dict(device_count=0), "no CUDA device is visible"),
    ],
)
def test_a_machine_that_cannot_says_why(machine: dict[str, int], reason: str, cuda: Emulated) -> None:
    for name, value in machine.items():
        setattr(cuda.native.machine(), name, value)
    with pytest.raises(RuntimeError, match=f"backend='cuda' is not available: .*{reason}"):
        danlu.Lion(some_params(), backend="cuda")


def test_a_device_without_code_for_it_is_refused(cuda: Emulated) -> None:
    other = Cuda(cuda.native, device_type="cpu")
    cuda.native.machine().capability = 75
    opt = ADAMW.make(some_params(), backend="cuda")
    from danlu.backends import cuda as module

    module._capability.cache_clear()
    try:
        (row, *_) = opt.backend_report()
    finally:
        module._capability.cache_clear()
    assert row.backend == "reference"
    assert "danlu._cuda is built for 80-real,90-real,100, cpu has compute capability 7.5" in row.reason
    assert other.unavailable() is None


def test_same_bits_whichever_way_addresses_are_read(monkeypatch: pytest.MonkeyPatch, cuda: Emulated) -> None:
    results = []
    for way in ("0", "1"):
        monkeypatch.setenv("DANLU_DLPACK", way)
        opt = ADAMW.make(some_params(), backend="cuda")
        for t in range(3):
            give_gradients(parameters(opt), t)
            opt.step()
        results.append(copies(opt))
    assert all(map(same_bits, *results))


def listing(rows: list[int], shape: tuple[int, int]) -> torch.Tensor:
    indices = torch.tensor([rows])
    return torch.sparse_coo_tensor(indices, torch.ones(len(rows), shape[1]), shape, check_invariants=True)


def blocks_of_a_step(opt: torch.optim.Optimizer, cuda: Emulated) -> list[int]:
    opt.step()  # makes state
    cuda.native.reset()
    opt.step()
    return [launch.blocks for launch in cuda.native.machine().launches]


def test_lazy_rows_take_blocks_by_their_number(cuda: Emulated) -> None:
    """Rows that are neighbours in parameter and gradient share theirs."""
    shape = (9000, 4)
    p = torch.nn.Parameter(torch.ones(shape))
    opt = danlu.Lazy(danlu.Lion([p], backend="cuda"))
    p.grad = listing([*range(100, 5000)], shape)
    assert blocks_of_a_step(opt, cuda) == [2]
    p.grad = listing([*range(5000, 100, -1)], shape)
    assert sum(blocks_of_a_step(opt, cuda)) == 4900
    p.grad = torch.zeros(shape)
    p.grad[0:4200:2] = 1.0
    blocks = blocks_of_a_step(opt, cuda)
    assert sum(blocks) == 2100
    assert len(blocks) == 3
    p.grad.zero_()
    assert blocks_of_a_step(opt, cuda) == []


def test_lazy_moments_take_blocks_of_whole_chunks(cuda: Emulated) -> None:
    shape = (9000, 4)
    p = torch.nn.Parameter(torch.ones(shape))
    opt = danlu.Lazy(danlu.Lion([p], backend="cuda"), "params")
    p.grad = listing([4000], shape)
    assert blocks_of_a_step(opt, cuda) == [1 + 1 + 2]
    p.grad = listing([0, 8999], shape)
    assert blocks_of_a_step(opt, cuda) == [2 + 3]


def waits(self: torch.Tensor) -> bool:
    raise AssertionError("waits for the device")


def test_a_lazy_step_cannot_be_captured(cuda: Emulated, monkeypatch: pytest.MonkeyPatch) -> None:
    p = torch.nn.Parameter(torch.ones(4, 2))
    opt = danlu.Lazy(danlu.Lion([("table", p)], backend="cuda", capturable=True))
    for g in (torch.ones(4, 2), listing([1], (4, 2))):
        p.grad = g
        opt.step()
        before = p.detach().clone()
        with monkeypatch.context() as patched:
            patched.setattr(capture, "is_capturing", lambda device: True)
            patched.setattr(torch.Tensor, "__int__", waits)
            patched.setattr(torch.Tensor, "__bool__", waits)
            with pytest.raises(RuntimeError, match=r"^table: a lazy step waits for its rows, which no graph"):
                opt.step()
        assert torch.equal(p, before)
        p.grad = None


def test_nor_can_the_first_one(cuda: Emulated, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of which a plan is made."""
    p = torch.nn.Parameter(torch.ones(4, 2))
    p.grad = listing([1], (4, 2))
    opt = danlu.Lazy(danlu.Lion([("table", p)], backend="cuda", capturable=True))
    with monkeypatch.context() as patched:
        patched.setattr(capture, "is_capturing", lambda device: True)
        patched.setattr(torch.Tensor, "__int__", waits)
        with pytest.raises(RuntimeError, match=r"^table: a lazy step waits for its rows, which no graph"):
            opt.step()
    assert not opt.state


@pytest.mark.parametrize("mode", MODES)
def test_a_gradient_that_comes_late_is_listed(
    mode: str, cuda: Emulated, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As from another thread, once the rows of all gradients are read."""
    p, q = (torch.nn.Parameter(torch.ones(4, 2)) for _ in range(2))
    opt = danlu.Lazy(danlu.AdamW([p, q], lr=1.0, weight_decay=0.5, backend="cuda"), mode)
    for x in (p, q):
        x.grad = listing([1], (4, 2))
    opt.step()
    p.grad = None
    rows_of = GpuExecutor.rows_of

    def then_another(*arguments: Any) -> Any:
        p.grad = torch.zeros(4, 2)
        return rows_of(*arguments)

    monkeypatch.setattr(GpuExecutor, "rows_of", then_another)
    before = p.detach().clone()
    opt.step()
    assert opt.state[p]["step"] == opt.state[q]["step"] == 2
    assert torch.equal(p, before)
