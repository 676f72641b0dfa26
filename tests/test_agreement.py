"""Ranks that disagree: none is left waiting, and nothing is written on any."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist

from danlu.sharding import local
from danlu.testing import same_bits
from emulated import Emulated
from meshes import Layout, experts, fsdp, give_gradients, parameters, run_on, tp_fsdp
from sharded_rules import RULES

MESHES = {"fsdp": (2, fsdp), "tp-fsdp": (4, tp_fsdp), "experts": (4, experts)}
ALL = ("adafactor", "lamb-norm", "tiger", "adamw-norm")
SOME = ("adafactor", "adamw-norm")  # without --all
ODD = 1  # the rank that differs
BACKENDS = ("reference", "cpu")


def everything(opt: Any) -> list[torch.Tensor]:
    params = [p for group in opt.param_groups for p in group["params"]]
    return [local(t).detach().clone() for p in params for t in (p, *opt.state[p].values())]


def missing_gradient(opt: Any, params: dict[str, torch.nn.Parameter]) -> None:
    params["down"].grad = None


def another_dtype(opt: Any, params: dict[str, torch.nn.Parameter]) -> None:
    p = params["large"]
    p.grad_dtype = None
    p.grad = p.grad.to(torch.int32)  # type: ignore[union-attr]


def state_of_another_shape(opt: Any, params: dict[str, torch.nn.Parameter]) -> None:
    held = opt.state[params["up"]]
    name = next(name for name in held if name not in ("step", "micro_step"))
    held[name] = torch.zeros(3)


def setting_out_of_range(opt: Any, params: dict[str, torch.nn.Parameter]) -> None:
    group = opt.param_groups[0]
    group["decay_rate" if "decay_rate" in group else "lr"] = "fast"


# with what the rank itself says, and what the others do
WRONG: dict[str, tuple[Callable[..., None], tuple[type[Exception], ...], str]] = {
    "missing gradient": (missing_gradient, (RuntimeError,), "missing on some ranks only"),
    "another dtype": (another_dtype, (TypeError, ValueError), "failed on another rank"),
    "state of another shape": (state_of_another_shape, (TypeError, ValueError), "failed on another rank"),
    "setting out of range": (setting_out_of_range, (TypeError, ValueError), "failed on another rank"),
}


def step(opt: Any) -> Exception | None:
    try:
        opt.step()
    except Exception as error:
        return error
    return None


def disagreements(rank: int, place: Callable[[], Layout], backend: str, names: Sequence[str]) -> None:
    layout = place()
    wrong = []
    for name in names:
        for what, (change, own, others) in WRONG.items():
            params, wanted = parameters(layout), parameters(layout)
            opt, want = (RULES[name][0](those, backend=backend) for those in (params, wanted))
            for t in range(2):
                for made, those in ((opt, params), (want, wanted)):
                    give_gradients(those, t, layout)
                    made.step()
            give_gradients(params, 2, layout)
            groups = [dict(group) for group in opt.param_groups]
            states = {p: dict(held) for p, held in opt.state.items()}
            if rank == ODD:
                change(opt, params)
            before = everything(opt)
            error = step(opt)
            if rank == ODD and not isinstance(error, own):
                wrong.append((name, what, "own", repr(error)))
            elif rank == ODD and what == "missing gradient":
                assert "On this one: " in str(error)
                assert "['params'][2]" in str(error) or "param_groups[2]" in str(error), error
            elif rank != ODD and others not in str(error):
                wrong.append((name, what, "others", repr(error)))
            if not all(map(same_bits, everything(opt), before)):
                wrong.append((name, what, "something was written"))
            # and all go on when it is mended
            for group, was in zip(opt.param_groups, groups, strict=True):
                group.update(was)
            for p, held in states.items():
                opt.state[p].update(held)
            for p in params.values():
                p.grad = None
            give_gradients(params, 2, layout)
            give_gradients(wanted, 2, layout)
            if (again := step(opt)) is not None:
                wrong.append((name, what, "mended", repr(again)))
            want.step()
            if not all(map(same_bits, everything(opt), everything(want))):
                wrong.append((name, what, "goes on otherwise"))
    assert not wrong, wrong


@pytest.fixture
def names(pytestconfig: pytest.Config) -> Sequence[str]:
    return ALL if pytestconfig.getoption("--all") else SOME


def left_to_all(*quick: object) -> list[Any]:
    """Every mesh and backend, of which these are enough without --all."""
    found = []
    for mesh in MESHES:
        for backend in BACKENDS:
            marks = () if (mesh, backend) in quick else pytest.mark.full
            found.append(pytest.param(mesh, backend, marks=marks, id=f"{mesh}-{backend}"))
    return found


@pytest.mark.parametrize(("mesh", "backend"), left_to_all(("fsdp", "reference"), ("tp-fsdp", "cpu")))
def test_what_is_wrong_on_one_rank(mesh: str, backend: str, names: Sequence[str]) -> None:
    ranks, place = MESHES[mesh]
    run_on(ranks, disagreements, place, backend, names)


def infinities(rank: int, place: Callable[[], Layout], backend: str, names: Sequence[str]) -> None:
    """GradScaler reduces what it found over the mesh of one gradient: ranks of another can differ."""
    layout = place()
    for name in (*names, "adamw"):  # element-wise rules agree only on that
        params = parameters(layout)
        opt = RULES[name][0](params, backend=backend)
        give_gradients(params, 0, layout)
        opt.step()
        before = everything(opt)
        opt.grad_scale, opt.found_inf = torch.tensor(2.0), torch.tensor(float(rank == ODD))
        give_gradients(params, 1, layout)
        opt.step()
        assert all(map(same_bits, everything(opt), before)), name
        opt.found_inf = torch.tensor(0.0)
        opt.step()
        assert not all(map(same_bits, everything(opt), before)), name


def absent_everywhere(rank: int, place: Callable[[], Layout], backend: str, names: Sequence[str]) -> None:
    layout = place()
    for name in names:
        params, wholes = parameters(layout), parameters()
        opt, want = (RULES[name][0](those, backend=backend) for those in (params, wholes))
        for t in range(3):
            give_gradients(params, t, layout)
            give_gradients(wholes, t)
            for those in (params, wholes) if t != 1 else ():
                those["up"].grad = None  # at first and at last
            opt.step()
            want.step()
        assert opt.state[params["up"]]["step"] == want.state[wholes["up"]]["step"] == 1, name
        assert opt.state[params["down"]]["step"] == 3, name


@pytest.mark.parametrize(("mesh", "backend"), left_to_all(("experts", "cpu")))
@pytest.mark.parametrize("work", [infinities, absent_everywhere], ids=lambda work: work.__name__)
def test_steps_and_rests_on_all_ranks(
    work: Callable[..., None], mesh: str, backend: str, names: Sequence[str]
) -> None:
    ranks, place = MESHES[mesh]
    run_on(ranks, work, place, backend, names)


def late_words(rank: int, place: Callable[[], Layout], names: Sequence[str]) -> None:
    """With counters on a device the host of no rank waits to learn what the others say."""
    layout = place()
    for name in names:
        for what in ("missing gradient", "another dtype", "infinity"):
            params, wanted = parameters(layout), parameters(layout)
            opt, want = (RULES[name][0](those, backend="cuda", capturable=True) for those in (params, wanted))
            for made, those in ((opt, params), (want, wanted)):
                give_gradients(those, 0, layout)
                made.step()
            before = everything(opt)
            give_gradients(params, 1, layout)
            if what == "infinity":
                opt.found_inf = torch.tensor(float(rank == ODD))
            elif rank == ODD:
                WRONG[what][0](opt, params)
            error = step(opt)
            assert (error is not None) == (rank == ODD and what == "another dtype"), (name, what, error)
            assert all(map(same_bits, everything(opt), before)), (name, what)
            opt.found_inf = None
            for p in params.values():
                p.grad = None
            give_gradients(params, 1, layout)
            give_gradients(wanted, 1, layout)
            if what != "infinity":
                with pytest.raises(RuntimeError, match=r"failed on another rank|missing on some ranks"):
                    opt.step()
            assert all(map(same_bits, everything(opt), before)), (name, what)
            opt.step()
            want.step()
            assert all(map(same_bits, everything(opt), everything(want))), (name, what)


@pytest.mark.parametrize(
    "mesh", [pytest.param(mesh, marks=() if mesh == "fsdp" else pytest.mark.full) for mesh in MESHES]
)
def test_no_host_waits_for_a_device(mesh: str, cuda: Emulated, names: Sequence[str]) -> None:
    ranks, place = MESHES[mesh]
    run_on(ranks, late_words, place, names)


def other_optimizers(rank: int) -> None:
    layout = fsdp()
    for name in ("adafactor", "adamw-norm"):
        params = parameters(layout)
        if rank == ODD:
            params = dict(reversed(params.items()))
        opt = RULES[name][0](params, backend="cpu")
        give_gradients(params, 0, layout)
        before = everything(opt)
        with pytest.raises(ValueError, match="optimizers of the ranks differ"):
            opt.step()
        assert len(everything(opt)) == len(before)
    dist.barrier()


def test_optimizers_of_other_parameters_are_told_apart() -> None:
    run_on(2, other_optimizers)
