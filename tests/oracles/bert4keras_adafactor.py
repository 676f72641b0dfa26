"""bert4keras' AdaFactor, transcribed to numpy; the library needs a Keras that nothing installs any more."""

from __future__ import annotations

import numpy as np


class Bert4KerasAdafactor:
    """One parameter in float64; beta2 = 1 - t^-0.8 as its default."""

    def __init__(
        self,
        lr: float | None = 1e-3,
        epsilon1: float = 1e-30,
        epsilon2: float = 1e-3,
        multiply_by_parameter_scale: bool = True,
        clipping_threshold: float | None = 1.0,
        beta1: float = 0.0,
        min_dim_size_to_factor: int = 128,
    ) -> None:
        self.lr, self.epsilon1, self.epsilon2 = lr, epsilon1, epsilon2
        self.scaled, self.clip, self.beta1 = multiply_by_parameter_scale, clipping_threshold, beta1
        self.smallest = min_dim_size_to_factor
        self.t = 0

    def rate(self) -> float:
        if self.lr is not None:
            return self.lr
        rate = min(self.t**-0.5, 0.01)
        return rate if self.scaled else 0.05 * rate

    def axes(self, shape: tuple[int, ...]) -> tuple[int, int] | None:
        """Over which vr and vc average."""
        if len(shape) < 2:
            return None
        by_size = np.array(shape).argsort(kind="stable")
        if shape[by_size[-2]] < self.smallest:
            return None
        return int(by_size[-1]), int(by_size[-2])

    def step(self, p: np.ndarray, g: np.ndarray) -> np.ndarray:
        self.t += 1
        beta2 = 1 - self.t**-0.8
        g2 = g**2 + self.epsilon1
        axes = self.axes(p.shape)
        if axes is None:
            v = beta2 * getattr(self, "v", np.zeros_like(p)) + (1 - beta2) * g2
            self.v = v
        else:
            means = [g2.mean(axis, keepdims=True) for axis in axes]
            old = getattr(self, "averages", [np.zeros_like(m) for m in means])
            self.averages = vr, vc = [beta2 * a + (1 - beta2) * m for a, m in zip(old, means, strict=True)]
            v = vr * vc / vr.mean(axis=axes[1], keepdims=True)
        u = g / np.sqrt(v + self.epsilon1)
        if self.clip is not None:
            u = u / max(1.0, np.sqrt((u**2).mean()) / self.clip)
        if self.beta1 > 0:
            self.m = self.beta1 * getattr(self, "m", np.zeros_like(p)) + (1 - self.beta1) * u
            u = self.m
        if self.scaled:
            u = u * max(np.sqrt((p**2).mean()), self.epsilon2)
        return p - self.rate() * u
