"""Adafactor."""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import Any

import torch
from typing_extensions import Unpack

from .. import checks, scalar
from ..locking import one_at_a_time
from ..optimizer import EngineOptions, FusedOptimizer, Params
from ..partial_sums import Statistic, SummedDims
from .adafactor_checkpoints import translated
from .adafactor_formula import coefficients, reference
from .adafactor_options import check, refuse_both, refuse_foreign, settled
from .adafactor_presets import NEUTRAL, PRESETS
from .adafactor_schedule import scheduled_lr, show_lr, warn_of_schedulers

UNSET: Any = object()


class Adafactor(FusedOptimizer):
    """Second moments as averages over rows and columns (Shazeer & Stern 2018, arXiv:1804.04235).

        alpha = rho * max(eps2, rms(p))                     with scale_parameter, else rho
        beta2 = 1 - t^decay_rate
        R = beta2 * R + (1 - beta2) * mean(g^2 + eps1)      over the columns; C likewise over the rows
        u = g / sqrt(R * C / mean(R))                       or, not factored, g / sqrt(V)
        u = u / max(1, rms(u) / clip_threshold)
        p = p - alpha * (u + weight_decay * p)

    rho is lr. With `relative_step` it is min(1e-2, 1 / sqrt(t)), with `warmup_init` as well min(1e-6 * t,
    1 / sqrt(t)). With beta1 the momentum of alpha * u replaces alpha * u. Each preset follows the library of
    its name to the last digit:

        preset       factored        from size  alpha                               eps1         decay
        huggingface  last two dims   any        as above                            added        wd * alpha
        torch        last two dims   any        min(lr, 1/sqrt(t)) * max(eps2, ..)  a bound      lr * wd
        optax        two largest     128        lr * max(eps2, ..); lr None: 1      added        wd
        big_vision   two largest     32         lr                                  added        wd
        bert4keras   two largest     128        lr * max(eps2, ..)                  added twice  none

    In big_vision and bert4keras the momentum averages u before alpha. With `relative_step` bert4keras takes
    min(1e-2, 1 / sqrt(t)), and 0.05 of it without scale_parameter.

    A group with `relative_step` shows rho as its lr: the first step's at first, then the last step's. Other
    values written there are ignored, with a warning if a scheduler wrote them. `danlu.RelativeStepLR` and
    transformers' `AdafactorSchedule` report rho (docs/schedules.md). `OneCycleLR` and `CyclicLR` find no
    momentum to cycle and need cycle_momentum=False.

    Args:
        params: tensors, named tensors or parameter groups, as for any `torch.optim.Optimizer`.
        lr: learning rate, a float or a tensor of one element. It turns relative_step off, None turns it on,
            here and in a group. A group may also set relative_step alone. In optax None is 1.
        eps: (eps1, eps2), for the squares and for rms(p). eps1 None, in the preset torch, is the machine
            epsilon of each parameter's dtype.
        clip_threshold: bound of the root mean square of u; None turns it off.
        decay_rate: exponent of the second moment's decay, less than 0.
        beta1: of the momentum; None or 0 for none.
        weight_decay: decoupled; see the table.
        scale_parameter: whether steps are relative to the parameter's root mean square.
        relative_step: whether rho is the preset's own schedule, in huggingface (by default) and bert4keras.
        warmup_init: huggingface's warm-up.
        beta2_cap: upper bound of beta2, 0.999 in big_vision; None for none.
        min_dim_size_to_factor: "from size" in optax, big_vision and bert4keras, at least 1. States made with
            another size have other shapes, and a step with them raises.
        preset: one of the table.
        engine: what every danlu optimizer takes, see `danlu.FusedOptimizer`; in big_vision state_dtype is
            bfloat16 by default.

    Options left out have the preset's defaults. State per parameter: `step`; `row_var` and `col_var`, of the
    parameter's shape but 1 along the second or the first factored dimension, or else `variance` of the
    parameter's shape; with beta1 `exp_avg`. The state_dicts of `torch.optim.Adafactor` and
    `transformers.Adafactor` load as they are.

    Raises:
        ValueError: an option is out of its range, the preset does not have it, or a group has both an lr and
            relative_step=True.

    >>> p = torch.nn.Parameter(torch.tensor([[2.0, -2.0]]))
    >>> p.grad = torch.tensor([[1.0, -1.0]])
    >>> danlu.Adafactor([p], lr=0.25).step()
    >>> p.tolist()
    [[1.5, -1.5]]
    """

    state_names = ("row_var", "col_var", "variance", "exp_avg")
    optional_states = ("exp_avg",)  # beta1 may be turned on later
    reduces = True
    reference_takes_shape = True
    _warned = False  # of a scheduler whose lr is ignored

    def __init__(
        self,
        params: Params,
        lr: float | torch.Tensor | None = UNSET,
        eps: tuple[float | None, float] = UNSET,
        clip_threshold: float | None = UNSET,
        decay_rate: float = UNSET,
        beta1: float | None = UNSET,
        weight_decay: float = UNSET,
        scale_parameter: bool = UNSET,
        relative_step: bool = UNSET,
        warmup_init: bool = UNSET,
        beta2_cap: float | None = UNSET,
        min_dim_size_to_factor: int = UNSET,
        *,
        preset: str = "huggingface",
        **engine: Unpack[EngineOptions],
    ) -> None:
        checks.one_of("preset", preset, tuple(PRESETS))
        options = dict(
            lr=lr,
            eps=eps,
            clip_threshold=clip_threshold,
            decay_rate=decay_rate,
            beta1=beta1,
            weight_decay=weight_decay,
            scale_parameter=scale_parameter,
            relative_step=relative_step,
            warmup_init=warmup_init,
            beta2_cap=beta2_cap,
            min_dim_size_to_factor=min_dim_size_to_factor,
        )
        given = {name: value for name, value in options.items() if value is not UNSET}
        refuse_foreign(preset, given)
        refuse_both(given)
        if preset == "big_vision":
            engine.setdefault("state_dtype", torch.bfloat16)
        defaults = {**PRESETS[preset].options, "preset": preset}
        super().__init__(params, {**defaults, **settled(given, defaults)}, **engine)

    # Which states and rules a parameter has.

    def states(self, group: dict[str, Any], shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        dims = _dims(group, shape)
        found: dict[str, tuple[int, ...]] = {"variance": ()}
        if dims is not None:
            first, second = dims
            found = {"row_var": (second,), "col_var": (first,)}
        return {**found, "exp_avg": ()} if group.get("beta1") else found

    def rule(self, group: dict[str, Any], shape: tuple[int, ...]) -> str:
        preset = PRESETS[group["preset"]]
        factored = "" if _dims(group, shape) is None else "_factored"
        root = "_root" if factored and preset.eps_under_root else ""
        return f"adafactor{factored}{root}" + ("_momentum" if group.get("beta1") else "")

    def matrix(
        self, group: dict[str, Any], shape: tuple[int, ...], part: tuple[int, ...] | None = None
    ) -> tuple[int, int, int] | None:
        dims, part = _dims(group, shape), shape if part is None else part
        if dims is None:
            return 1, 1, math.prod(part)
        first, second = dims
        if math.prod((*shape[first + 1 : second], *shape[second + 1 :])) > 1:
            return None
        return math.prod(part[:first]), part[first], part[second]

    def sums(self, group: dict[str, Any], shape: tuple[int, ...]) -> tuple[tuple[Statistic, ...], ...]:
        dims = _dims(group, shape)
        norms = ((Statistic.of_all(shape),) * 2,) if _needs_norms(group) else ()
        if dims is None:
            return norms
        first, second = dims
        squares = (Statistic(over, power=2) for over in ((second,), (first,), (first, second)))
        averages = Statistic((first,), kept_out=(second,), power=0)
        return (*squares, averages), *norms

    def summed_dims(self, group: dict[str, Any], shape: tuple[int, ...]) -> SummedDims:
        dims = _dims(group, shape)
        return ((), ()) if dims is None else ((dims[1],), (dims[0],))

    def structure(self, group: dict[str, Any]) -> Hashable:
        size = group.get("min_dim_size_to_factor")
        beta1, own_eps = bool(group.get("beta1")), group["eps"][0] is None
        return group["preset"], beta1, own_eps, size, _needs_norms(group)

    def variant(self, group: dict[str, Any], p: torch.Tensor) -> Hashable:
        return torch.finfo(p.dtype).eps if group["eps"][0] is None else None

    def hyper(
        self, group: dict[str, Any], device: torch.device | None = None, variant: Hashable = None
    ) -> dict[str, Any]:
        eps1, eps2 = group["eps"]
        options = {name: group.get(name, neutral) for name, neutral in NEUTRAL.items()}
        return dict(
            options,
            lr=self.learning_rate(group, device),
            eps=(variant if eps1 is None else eps1, eps2),
            scale_parameter=_scales(group),
            preset=group["preset"],
        )

    def learning_rate(
        self, group: dict[str, Any], device: torch.device | None = None
    ) -> scalar.Scalar | None:
        return None if group.get("relative_step") else super().learning_rate(group, device)

    # The lr that a group with a schedule of its own shows; no step reads it.

    def scheduled_lr(self, group: dict[str, Any], *, ahead: int = 0) -> float | torch.Tensor:
        """rho of the group's last step, or of one `ahead` of it; before any step that of the first one.
        The steps are those of the group's first parameter that has made one.

        A float64 tensor where that counter is on a device: nothing waits.
        """
        held = (self.state.get(p, {}).get("step") for p in group["params"])
        made: Any = next((step for step in held if step is not None), 0.0)
        return scheduled_lr(group, made, ahead)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if isinstance(param_group, dict):
            if param_group.get("relative_step") and param_group.keys() >= self.defaults.keys():
                param_group = {**param_group, "lr": None}  # another one's group, which shows its lr
            refuse_both(param_group)
            param_group = settled(param_group, self.defaults)
        super().add_param_group(param_group)
        self._show_lr()

    def _get_lr(self, group: dict[str, Any], state: dict[str, Any]) -> float:
        """What transformers' `AdafactorSchedule` asks for: alpha of the parameter whose state this is, or of
        the group's first one, by its size as it is now. Waits for a parameter on a device.
        """
        p = next((q for q in group["params"] if self.state.get(q) is state), group["params"][0])
        lr = float(self.scheduled_lr(group))
        scaled = _scales(group)
        return lr * max(group["eps"][1], _rms(p.detach())) if scaled else lr

    @one_at_a_time
    def _step(self) -> None:
        if not self._warned:
            self._warned = warn_of_schedulers(self.param_groups)
        super()._step()
        self._show_lr()

    def _show_lr(self) -> None:
        for group in self.param_groups:
            if group.get("relative_step"):
                show_lr(group, self.scheduled_lr(group))

    # State of elsewhere, or of before.

    def __setstate__(self, loaded: dict[str, Any]) -> None:
        super().__setstate__(loaded)
        self._show_lr()

    def translate(self, loaded: dict[str, Any]) -> dict[str, Any]:
        return translated(loaded, self.defaults)

    def _check_group(self, group: dict[str, Any]) -> None:
        preset = self.defaults["preset"]
        if group.get("preset", preset) != preset:
            raise ValueError(f"preset must be {preset!r} in every group, got {group['preset']!r}")
        refuse_foreign(preset, group)
        super()._check_group(group)

    check = staticmethod(check)

    # The formula.
    coefficients = staticmethod(coefficients)
    reference = staticmethod(reference)


def _rms(x: torch.Tensor) -> float:
    return math.sqrt(x.double().square().mean().item())


def _scales(group: dict[str, Any]) -> bool:
    return bool(group.get("scale_parameter", group["preset"] == "torch"))


def _needs_norms(group: dict[str, Any]) -> bool:
    """Whether a step needs norms of parameters or updates."""
    return group.get("clip_threshold") is not None or _scales(group)


def _dims(group: dict[str, Any], shape: tuple[int, ...]) -> tuple[int, int] | None:
    """The two dimensions of a parameter of that shape to factor, if any."""
    return PRESETS[group["preset"]].dims(shape, group.get("min_dim_size_to_factor", 0))
