"""Run by test_threads.py in a process of its own, since what it looks for would crash it: an optimizer, or
several, in the hands of several threads.
"""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Callable

import torch

import danlu
from danlu.backends import BACKENDS
from danlu.testing import same_bits

THREADS, STEPS = 3, 15
MAKERS: dict[str, Callable[..., danlu.FusedOptimizer]] = {
    "AdamW": danlu.AdamW,
    "Lazy": lambda params, **engine: danlu.Lazy(danlu.Lion(params, **engine)),
    "LayerAdaptation": lambda params, **engine: danlu.LayerAdaptation(danlu.Lion(params, **engine)),
}


def some_params() -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.linspace(-1, 1, 3000 + i).view(-1, 1).clone()) for i in range(8)]


def step(opt: danlu.FusedOptimizer, params: list[torch.nn.Parameter]) -> None:
    """Every step has the same gradients, so that their order does not matter."""
    for p in params:
        p.grad = torch.linspace(1, 2, p.numel()).view(p.shape)
    opt.step()


def at_once(works: list[Callable[[], None]]) -> None:
    """Each of them STEPS times, in threads of their own; raises what any of them raises."""
    errors: list[BaseException] = []
    ready = threading.Barrier(len(works))

    def repeat(work: Callable[[], None]) -> None:
        try:
            ready.wait()
            for _ in range(STEPS):
                work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=repeat, args=[work]) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def all_same(opt: danlu.FusedOptimizer, want: danlu.FusedOptimizer) -> bool:
    pairs = zip(opt.param_groups[0]["params"], want.param_groups[0]["params"], strict=True)
    return all(
        same_bits(a, b)
        for p, q in pairs
        for a, b in ((p.detach(), q.detach()), *((opt.state[p][k], x) for k, x in want.state[q].items()))
    )


def steps_of_one_optimizer(make: Callable[..., danlu.FusedOptimizer], backend: str) -> None:
    params, wanted = some_params(), some_params()
    opt, want = make(params, backend=backend), make(wanted, backend=backend)
    at_once([lambda: step(opt, params)] * THREADS)
    for _ in range(THREADS * STEPS):
        step(want, wanted)
    assert all_same(opt, want)


def steps_of_different_optimizers(make: Callable[..., danlu.FusedOptimizer], backend: str) -> None:
    mine = [some_params() for _ in range(THREADS + 1)]
    made = [make(params, backend=backend) for params in mine]
    works = [lambda opt=opt, params=params: step(opt, params) for opt, params in zip(made, mine, strict=True)]  # type: ignore[misc]
    at_once(works[1:])
    for _ in range(STEPS):
        works[0]()
    assert all(all_same(opt, made[0]) for opt in made[1:])


def everything_else(make: Callable[..., danlu.FusedOptimizer], backend: str) -> None:
    """What a trainer's other threads may do while one steps."""
    params = some_params()
    opt = make(params, backend=backend)
    step(opt, params)
    saved = copy.deepcopy(opt.state_dict())

    def replace() -> None:
        held = opt.state[params[0]]
        held["exp_avg"] = held["exp_avg"].clone() if "exp_avg" in held else None

    def add() -> None:
        if len(opt.param_groups) < 20:
            opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(50, 1))]})

    at_once([lambda: step(opt, params), opt.state_dict, opt.backend_report, opt.zero_grad])
    at_once([lambda: step(opt, params), lambda: opt.load_state_dict(saved), lambda: copy.deepcopy(opt)])
    at_once([lambda: step(opt, params), opt.state_dict, add])
    if "exp_avg" in opt.state[params[0]]:
        at_once([lambda: step(opt, params), replace])
    assert all(p.isfinite().all() for p in params)


if __name__ == "__main__":
    from emulated import emulated

    BACKENDS["cuda"] = emulated()
    torch.set_num_threads(1)  # of each step: more would only wait for one another
    sys.setswitchinterval(1e-5)
    for backend in ("cpu", "reference", "cuda"):
        for name, make in MAKERS.items():
            if backend == "cpu" or name == "AdamW":
                for work in (steps_of_one_optimizer, steps_of_different_optimizers, everything_else):
                    print(backend, name, work.__name__, flush=True)
                    work(make, backend)
