"""The one list of rules: name as in csrc/rules.h, Triton functions, coefficients in its order."""

from __future__ import annotations

from typing import Any, NamedTuple

from ...schedule import Reduction
from . import adafactor, amos, lamb
from . import tiger as tigers
from .accumulate import accumulate
from .adam import adam, adamw
from .adax import adax, adax_inside, adaxw, adaxw_inside
from .average import average
from .layer_adapted import layer_adapted
from .lion import lion
from .lookahead import lookahead


class Rule(NamedTuple):
    """`function` is the step. The others belong to rules that reduce, see csrc/cpu/reduce.h.

    With sums the step takes their step scales as a fifth argument. States that are reduced are what stands in
    their place, and are given back unchanged.
    """

    function: Any  # (p, g, states, coefficients) -> (amount to subtract or other `outcome`, states)
    coefficients: tuple[str, ...]
    reduction: Reduction | None = None
    statistic: Any = None  # (g, coefficients) -> what is averaged
    average: Any = None  # along both: (v, mean, coefficients) -> v, else (v, b, ...) -> v, b, of p, of g
    row_factor: Any = None  # (average of a row, mean over rows, coefficients) -> what stands in its place
    column_factor: Any = None  # (average of a column, coefficients) -> what stands in its place
    needs_norms: Any = None  # (coefficients) -> whether sums are needed
    norms_need_p: Any = None  # (coefficients) -> whether p is; None: always
    norm_terms: Any = None  # (p, g, states, coefficients) -> terms
    finalize: Any = None  # (sums, size, coefficients) -> step scales
    scales: int = 0
    outcome: str = "subtracted"  # what becomes of the step: that, or "assigned" to the parameter, or "none"


_ADAM = ("beta1", "weight1", "beta2", "weight2", "lr1", "root2", "eps")
_ADAX = ("beta1", "weight1", "weight_t")
_TIGER = ("keep", "weight", "lr", "weight_decay")
_LAMB = ("beta1", "weight1", "beta2", "weight2", "root2", "eps", "correction1", "weight_decay", "lr", "adapt")
_ADAFACTOR = (
    *("beta2", "weight2", "eps1", "floor", "root_eps", "clip", "rho", "eps2", "scaled", "late"),
    *("beta1", "weight1", "decay", "decay_alpha"),
)
_AMOS = (
    *("beta", "weight", "correction", "xi_squared", "c_rate", "d_rate", "scale", "extra_l2", "clip"),
    *("momentum", "momentum_weight"),
)


def _tiger_scaled(reduction: Reduction) -> Rule:
    return Rule(
        tigers.step,
        _TIGER,
        reduction,
        needs_norms=tigers.needs_norms,
        norm_terms=tigers.norm_terms,
        finalize=tigers.finalize,
        scales=2,
    )


def _adafactor(step: Any, norm_terms: Any, along: str = "none") -> Rule:
    averages = dict(
        statistic=adafactor.statistic,
        average=adafactor.average,
        row_factor=adafactor.row_factor,
        column_factor=adafactor.column_factor,
    )
    return Rule(
        step,
        _ADAFACTOR,
        Reduction(along, sums=2),
        **(averages if along == "both" else {}),
        needs_norms=adafactor.needs_norms,
        norms_need_p=adafactor.norms_need_p,
        norm_terms=norm_terms,
        finalize=adafactor.finalize,
        scales=3,
    )


def _amos(step: Any, along: str) -> Rule:
    reduction = Reduction(along, sums=0)
    return Rule(step, _AMOS, reduction, statistic=amos.statistic, average=amos.average_pair)


# of optimizers; of each there is one with layer adaptation, too
ELEMENT_WISE = {
    "lion": Rule(lion, ("beta1", "weight1", "beta2", "weight2", "lr", "decay")),
    "tiger": Rule(tigers.tiger, ("keep", "weight", "eta", "decay")),
    "adamw": Rule(adamw, (*_ADAM, "decay")),
    "adam": Rule(adam, (*_ADAM, "weight_decay")),
    "adaxw": Rule(adaxw, (*_ADAX, "eps_t", "lr", "decay")),
    "adax": Rule(adax, (*_ADAX, "eps_t", "lr", "weight_decay")),
    "adaxw_inside": Rule(adaxw_inside, (*_ADAX, "eps", "lr", "decay")),
    "adax_inside": Rule(adax_inside, (*_ADAX, "eps", "lr", "weight_decay")),
}
RULES = {
    **ELEMENT_WISE,
    **{f"layer_{name}": layer_adapted(rule) for name, rule in ELEMENT_WISE.items()},
    "accumulate": Rule(accumulate, ("fresh", "weight"), outcome="none"),
    "average": Rule(average, ("weight",), outcome="none"),
    "lookahead": Rule(lookahead, ("alpha",), outcome="assigned"),
    "tiger_matrix": _tiger_scaled(Reduction("none", sums=1)),
    "tiger_rows": _tiger_scaled(Reduction("none", sums=1, row_by_row=True)),
    "lamb": Rule(
        lamb.step,
        (*_LAMB, "max_ratio"),
        Reduction("none", sums=2),
        needs_norms=lamb.needs_norms,
        norm_terms=lamb.norm_terms,
        finalize=lamb.finalize,
        scales=1,
    ),
    "adafactor": _adafactor(adafactor.step_full, adafactor.norm_terms_full),
    "adafactor_momentum": _adafactor(adafactor.step_full_momentum, adafactor.norm_terms_full),
    "adafactor_factored": _adafactor(adafactor.step_factored, adafactor.norm_terms_factored, "both"),
    "adafactor_factored_momentum": _adafactor(
        adafactor.step_factored_momentum, adafactor.norm_terms_factored, "both"
    ),
    "adafactor_factored_root": _adafactor(
        adafactor.step_factored_root, adafactor.norm_terms_factored_root, "both"
    ),
    "adafactor_factored_root_momentum": _adafactor(
        adafactor.step_factored_root_momentum, adafactor.norm_terms_factored_root, "both"
    ),
    "amos_elementwise": Rule(amos.elementwise, _AMOS),
    "amos_elementwise_momentum": Rule(amos.elementwise_momentum, _AMOS),
    "amos_rows": _amos(amos.reduced, "rows"),
    "amos_rows_momentum": _amos(amos.reduced_momentum, "rows"),
    "amos_columns": _amos(amos.reduced, "columns"),
    "amos_columns_momentum": _amos(amos.reduced_momentum, "columns"),
}
