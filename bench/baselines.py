"""What torch offers beside its own optimizers: Lion in torch operations, as it is usually written (the
formula of arXiv:2302.06675), and steps that torch.compile made.
"""

from __future__ import annotations

import torch
from torch.optim.optimizer import ParamsT


class PlainLion(torch.optim.Optimizer):
    """One parameter after the other, or all at once with torch's multi-tensor operations (`foreach`)."""

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        foreach: bool = False,
    ) -> None:
        super().__init__(params, dict(lr=lr, betas=betas, weight_decay=weight_decay))
        self.foreach = foreach

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        update = _all_at_once if self.foreach else _one_by_one
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            for p in params:
                if not self.state[p]:
                    self.state[p]["exp_avg"] = torch.zeros_like(p)
            momenta = [self.state[p]["exp_avg"] for p in params]
            update(
                params, [p.grad for p in params], momenta, group["lr"], group["betas"], group["weight_decay"]
            )


def _one_by_one(
    params: list[torch.Tensor],
    gradients: list[torch.Tensor],
    momenta: list[torch.Tensor],
    lr: float,
    betas: tuple[float, float],
    weight_decay: float,
) -> None:
    for p, g, m in zip(params, gradients, momenta, strict=True):
        p.mul_(1 - lr * weight_decay)
        p.add_(torch.lerp(g, m, betas[0]).sign_(), alpha=-lr)
        m.lerp_(g, 1 - betas[1])


def _all_at_once(
    params: list[torch.Tensor],
    gradients: list[torch.Tensor],
    momenta: list[torch.Tensor],
    lr: float,
    betas: tuple[float, float],
    weight_decay: float,
) -> None:
    torch._foreach_mul_(params, 1 - lr * weight_decay)
    directions = torch._foreach_lerp(gradients, momenta, betas[0])
    torch._foreach_sign_(directions)
    torch._foreach_add_(params, directions, alpha=-lr)
    torch._foreach_lerp_(momenta, gradients, 1 - betas[1])


def compiled_adamw(params: ParamsT) -> torch.optim.AdamW:
    """AdamW whose step torch.compile makes at the first call; counters are on the device."""
    optimizer = torch.optim.AdamW(params, capturable=True, foreach=True)
    optimizer.step = torch.compile(optimizer.step)  # type: ignore[method-assign]
    return optimizer


def compiled_adafactor(params: ParamsT) -> torch.optim.Adafactor:
    """Adafactor's step as one graph: numbers that it asks the device for are values of the graph."""
    optimizer = torch.optim.Adafactor(params, foreach=True)
    compiled = torch.compile(optimizer.step)

    def step() -> None:
        with torch._dynamo.config.patch(capture_scalar_outputs=True):
            compiled()

    optimizer.step = step  # type: ignore[method-assign, assignment]
    return optimizer
