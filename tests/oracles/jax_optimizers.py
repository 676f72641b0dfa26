"""optax's and jestimator's rules in a process of their own: jax starts threads, and other tests fork."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


@dataclass
class Run:
    """Steps of one parameter; an lr and a gradient (first axis) for each."""

    rule: str  # of RULES below
    start: np.ndarray
    gradients: np.ndarray
    lrs: Sequence[float]
    hyper: dict[str, Any]


def trajectories(folder: Path, runs: Sequence[Run]) -> list[dict[str, np.ndarray]]:
    """For each run the parameter after every step as "p", and the last states under their names there."""
    given, result = folder / "given.npz", folder / "result.npz"
    arrays = {f"{i} {name}": getattr(run, name) for i, run in enumerate(runs) for name in ARRAYS}
    settings = json.dumps([[run.rule, run.hyper] for run in runs])
    np.savez(given, settings=np.array(settings), **arrays)
    env = {**os.environ, "JAX_ENABLE_X64": "1", "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, __file__, given, result], check=True, env=env)
    found: list[dict[str, np.ndarray]] = [{} for _ in runs]
    with np.load(result) as arrays:
        for key, value in arrays.items():
            index, name = key.split()
            found[int(index)][name] = value
    return found


ARRAYS = ("start", "gradients", "lrs")


def lamb() -> tuple[Callable[..., Any], Callable[[Any], dict[str, Any]]]:
    import optax

    def make(lr: float, betas: Sequence[float], eps: float, weight_decay: float) -> Any:
        return optax.lamb(lr, *betas, eps=eps, weight_decay=weight_decay)

    return make, lambda state: dict(exp_avg=state[0].mu, exp_avg_sq=state[0].nu)


def amos() -> tuple[Callable[..., Any], Callable[[Any], dict[str, Any]]]:
    import optax
    from submodules import load

    module: Any = load("jestimator.amos", ["flax", "flax.serialization", "flax.traverse_util"])
    module.to_state_dict = lambda tree: tree
    module.from_state_dict = lambda target, tree: tree

    def make(lr: float, eta: float, shape: Sequence[int], **hyper: Any) -> Any:
        return module.amos(lr, lambda *_: eta, lambda *_: tuple(shape), **hyper)

    def states(state: Any) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for part in (state,) if hasattr(state, "b") else state:
            if hasattr(part, "b"):
                found.update(variance=part.v, decay=part.b)
            if isinstance(part, optax.EmaState):
                found.update(exp_avg=part.ema)
        return found

    return make, states


def adafactor() -> tuple[Callable[..., Any], Callable[[Any], dict[str, Any]]]:
    import optax

    return lambda lr, **hyper: optax.adafactor(lr, **hyper), lambda state: {}


def accumulated_adam() -> tuple[Callable[..., Any], Callable[[Any], dict[str, Any]]]:
    import optax

    return lambda lr, steps: optax.MultiSteps(optax.adam(lr), every_k_schedule=steps), lambda state: {}


def lookahead_adam() -> tuple[Callable[..., Any], Callable[[Any], dict[str, Any]]]:
    import optax

    def make(lr: float, k: int, alpha: float) -> Any:
        both = optax.lookahead(optax.adam(lr), sync_period=k, slow_step_size=alpha)

        def update(g: Any, state: Any, p: Any) -> Any:
            inner, slow = state
            updates, inner = both.update(g, inner, optax.LookaheadParams(p, slow))
            return updates.fast, (inner, slow + updates.slow)

        return optax.GradientTransformation(
            lambda p: (both.init(optax.LookaheadParams.init_synced(p)), p),
            update,  # type: ignore[arg-type]
        )

    return make, lambda state: dict(slow=state[1])


def averaged_adam() -> tuple[Callable[..., Any], Callable[[Any], dict[str, Any]]]:
    import optax

    def make(lr: float, decay: float) -> Any:
        adam, ema = optax.adam(lr), optax.ema(decay, debias=True)

        def update(g: Any, state: Any, p: Any) -> Any:
            updates, inner = adam.update(g, state[0], p)
            mean, averaged = ema.update(optax.apply_updates(p, updates), state[1])
            return updates, (inner, averaged, mean)

        return optax.GradientTransformation(lambda p: (adam.init(p), ema.init(p), p), update)  # type: ignore[arg-type]

    return make, lambda state: dict(mean=state[2])


RULES = dict(
    lamb=lamb,
    amos=amos,
    adafactor=adafactor,
    accumulated_adam=accumulated_adam,
    lookahead_adam=lookahead_adam,
    averaged_adam=averaged_adam,
)


def main(given: str, result: str) -> None:
    import jax
    import optax

    with np.load(given) as arrays:
        settings = json.loads(str(arrays["settings"]))
        inputs = [[arrays[f"{i} {name}"] for name in ARRAYS] for i in range(len(settings))]
    rules = {rule: RULES[rule]() for rule, _ in settings}
    found = {}
    for i, ((rule, hyper), (start, gradients, lrs)) in enumerate(zip(settings, inputs, strict=True)):
        make, states = rules[rule]
        p = jax.numpy.asarray(start)
        state = make(lrs[0], **hyper).init(p)
        trajectory = []
        for g, lr in zip(gradients, lrs.tolist(), strict=True):
            updates, state = make(lr, **hyper).update(jax.numpy.asarray(g), state, p)
            p = optax.apply_updates(p, updates)
            trajectory.append(np.asarray(p))
        found.update({f"{i} {name}": value for name, value in states(state).items()})
        found[f"{i} p"] = np.stack(trajectory)
    np.savez(result, **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
