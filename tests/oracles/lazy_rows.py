"""Lazy steps in float64, element by element as the formulas are written down, one row after the other."""

from __future__ import annotations

import math
from typing import Any

import torch

import danlu

Row = list[float]


def sign(x: float) -> float:
    return (x > 0) - (x < 0)


def lion(p: float, g: float, s: Row, t: int, h: dict[str, Any]) -> tuple[float, Row]:
    (b1, b2), (m,) = h["betas"], s
    c = b1 * m + (1 - b1) * g
    return h["lr"] * sign(c) + h["lr"] * h["weight_decay"] * p, [b2 * m + (1 - b2) * g]


def tiger(p: float, g: float, s: Row, t: int, h: dict[str, Any]) -> tuple[float, Row]:
    m = h["beta"] * s[0] + (1 - h["beta"]) * g
    return h["lr"] * sign(m) + h["lr"] * h["weight_decay"] * p, [m]


def adam(p: float, g: float, s: Row, t: int, h: dict[str, Any]) -> tuple[float, Row]:
    return _adam(p, g + h["weight_decay"] * p, s, t, h, 0.0)


def adamw(p: float, g: float, s: Row, t: int, h: dict[str, Any]) -> tuple[float, Row]:
    return _adam(p, g, s, t, h, h["lr"] * h["weight_decay"])


def adax(p: float, g: float, s: Row, t: int, h: dict[str, Any]) -> tuple[float, Row]:
    return _adax(p, g + h["weight_decay"] * p, s, t, h, 0.0)


def adaxw(p: float, g: float, s: Row, t: int, h: dict[str, Any]) -> tuple[float, Row]:
    return _adax(p, g, s, t, h, h["lr"] * h["weight_decay"])


RULES = {
    danlu.Lion: lion,
    danlu.Tiger: tiger,
    danlu.Adam: adam,
    danlu.AdamW: adamw,
    danlu.AdaX: adax,
    danlu.AdaXW: adaxw,
}


def _adam(p: float, g: float, s: Row, t: int, h: dict[str, Any], decay: float) -> tuple[float, Row]:
    b1, b2 = h["betas"]
    m, v = b1 * s[0] + (1 - b1) * g, b2 * s[1] + (1 - b2) * g * g
    corrected = math.sqrt(v / (1 - b2**t)) + h["eps"]
    return h["lr"] * m / (1 - b1**t) / corrected + decay * p, [m, v]


def _adax(p: float, g: float, s: Row, t: int, h: dict[str, Any], decay: float) -> tuple[float, Row]:
    b1, b2 = h["betas"]
    total = math.expm1(t * math.log1p(b2))
    m, v = b1 * s[0] + (1 - b1) * g, s[1] + b2 / total * (g * g - s[1])
    mode = h["eps_mode"]
    root = math.sqrt(v + h["eps"]) if mode == "inside" else math.sqrt(v)
    added = {"official": h["eps"] / math.sqrt(total), "hat": h["eps"], "inside": 0.0}[mode]
    return h["lr"] * m / (root + added) + decay * p, [m, v]


class PlainLazy:
    """Parameter and states of one matrix, as Python lists."""

    def __init__(self, optimizer: type, p: torch.Tensor, mode: str, hyper: dict[str, Any]) -> None:
        self._rule, self._mode, self._hyper = RULES[optimizer], mode, hyper
        self.p = p.double().tolist()
        count = 1 if optimizer in (danlu.Lion, danlu.Tiger) else 2
        self.states = [[[0.0] * p.shape[1] for _ in range(p.shape[0])] for _ in range(count)]
        self._t = 0

    def step(self, gradient: dict[int, Row]) -> None:
        """gradient: the rows that take part."""
        self._t += 1
        for i, row in enumerate(self.p):
            if i not in gradient and self._mode == "rows":
                continue
            for j, p in enumerate(row):
                old = [state[i][j] for state in self.states]
                g = gradient[i][j] if i in gradient else 0.0
                seen = p if i in gradient else 0.0
                step, new = self._rule(seen, g, old, self._t, self._hyper)
                for state, value in zip(self.states, new, strict=True):
                    state[i][j] = value
                if i in gradient:
                    row[j] = p - step
