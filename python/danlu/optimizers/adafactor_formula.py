"""Adafactor's formula, folded for kernels and in plain torch; `Adafactor` has it in words."""

from __future__ import annotations

import math
from typing import Any

import torch

from .. import scalar
from ..formula import sqrt
from ..partial_sums import PartialSums, Reducing
from .adafactor_presets import PRESETS
from .adafactor_schedule import rho


def coefficients(
    math: Any,
    *,
    step: Any,
    lr: Any,
    eps: Any,
    clip_threshold: Any,
    decay_rate: Any,
    beta1: Any,
    weight_decay: Any,
    scale_parameter: Any,
    relative_step: Any,
    warmup_init: Any,
    beta2_cap: Any,
    min_dim_size_to_factor: int,
    preset: str,
) -> dict[str, Any]:
    kind = PRESETS[preset]
    eps1, eps2 = eps
    beta2 = _beta2(math, step, decay_rate, beta2_cap)
    alpha = rho(
        math,
        step,
        lr=lr,
        scale_parameter=scale_parameter,
        relative_step=relative_step,
        warmup_init=warmup_init,
        preset=preset,
    )
    decay = {"lr * wd": 0.0 if lr is None else lr * weight_decay, "wd": weight_decay}
    return dict(
        beta2=beta2,
        weight2=1 - beta2,
        eps1=0.0 if kind.clamped else eps1,
        floor=eps1 if kind.clamped else 0.0,
        root_eps=eps1 if kind.eps_under_root else 0.0,
        clip=math.inf if clip_threshold is None else clip_threshold,
        rho=alpha,
        eps2=eps2,
        scaled=float(scale_parameter),
        late=float(kind.momentum_first),
        beta1=beta1 or 0.0,
        weight1=1 - (beta1 or 0.0),
        decay=decay.get(kind.decay, 0.0),
        decay_alpha=weight_decay if kind.decay == "wd * alpha" else 0.0,
    )


def reference(
    p: torch.Tensor,
    g: torch.Tensor,
    *states: torch.Tensor,
    step: float,
    lr: float | None,
    eps: tuple[float, float],
    clip_threshold: float | None,
    decay_rate: float,
    beta1: float | None,
    weight_decay: float,
    scale_parameter: bool,
    relative_step: bool,
    warmup_init: bool,
    beta2_cap: float | None,
    min_dim_size_to_factor: int,
    preset: str,
    shape: tuple[int, ...] | None = None,
) -> Reducing:
    kind = PRESETS[preset]
    eps1, eps2 = eps
    beta2 = float(_beta2(scalar, step, decay_rate, beta2_cap))
    size = rho(
        scalar,
        step,
        lr=lr,
        scale_parameter=scale_parameter,
        relative_step=relative_step,
        warmup_init=warmup_init,
        preset=preset,
    )
    dims = kind.dims(p.shape if shape is None else shape, min_dim_size_to_factor)
    added = 0.0 if kind.clamped else eps1
    root_eps = eps1 if kind.eps_under_root else 0.0
    floor = eps1 if kind.clamped else 0.0
    if dims is None:
        _average(states[0], g * g, beta2, added)
        u = g / sqrt(states[0] + root_eps).clamp(min=floor)
    else:
        rows, columns = states[:2]
        squares = (g * g).double()
        of_rows, of_columns = (PartialSums.over(squares, (dim,)) for dim in (dims[1], dims[0]))
        of_both = PartialSums.over(squares, dims)
        averages = PartialSums.over(rows, dims[:1])
        yield [of_rows, of_columns, of_both, averages]
        if of_both.count == 0:
            return torch.zeros_like(p)
        _average(rows, of_rows.mean(), beta2, added)
        _average(columns, of_columns.mean(), beta2, added)
        if averages.count == rows.shape[dims[0]]:
            mean = rows.double().mean(dims[0], keepdim=True)
        else:  # an average is linear: the mean of those before tells that of those after
            mean = averages.mean() * beta2 + (of_both.mean() + added) * (1 - beta2)
        mean = mean.clamp(min=floor)
        variance = (rows.double() / mean) * columns.double() + root_eps
        # in float64, where no product of the two is too small
        u = (g / variance.sqrt().clamp(min=floor)).to(g.dtype)

    sums = [PartialSums.over(x.double().square()) for x in (p, u)]
    yield sums
    if sums[0].count == 0:
        return torch.zeros_like(p)
    rms_p, rms_u = (math.sqrt(x.mean().item()) for x in sums)
    alpha = float(size)
    if scale_parameter:
        alpha = alpha * float(scalar.maximum(eps2, rms_p))
    clip = 1.0 if clip_threshold is None else float(scalar.maximum(1.0, rms_u / clip_threshold))
    u = u / clip
    if not kind.momentum_first:
        u = u * alpha
    if beta1:
        states[-1].mul_(beta1).add_(u * (1 - beta1))
        u = states[-1]
    if kind.momentum_first:
        u = u * alpha
    of_lr = 0.0 if lr is None else lr * weight_decay
    decay = {"wd * alpha": weight_decay * alpha, "lr * wd": of_lr, "wd": weight_decay}
    return u + p * decay.get(kind.decay, 0.0)


def _beta2(math: Any, step: Any, decay_rate: float, cap: float | None) -> Any:
    beta2 = 1 - math.pow(step, decay_rate)
    return beta2 if cap is None else math.minimum(beta2, cap)


def _average(v: torch.Tensor, squares: torch.Tensor, beta2: float, eps: float) -> None:
    """In place; fp32's largest number stands for those beyond it."""
    squares = squares.clamp(max=torch.finfo(v.dtype).max).to(v.dtype)
    v.copy_((v * beta2 + (squares + eps) * (1 - beta2)).clamp(max=torch.finfo(v.dtype).max))
