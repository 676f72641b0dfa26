"""The one list of rules: name as in csrc/rules.h, Triton function, coefficients in its order."""

from __future__ import annotations

from typing import Any, NamedTuple

from .adam import adam, adamw
from .adax import adax, adax_inside, adaxw, adaxw_inside
from .lion import lion
from .tiger import tiger


class Rule(NamedTuple):
    function: Any
    coefficients: tuple[str, ...]


_ADAM = ("beta1", "weight1", "beta2", "weight2", "lr1", "root2", "eps")
_ADAX = ("beta1", "weight1", "weight_t")

RULES = {
    "lion": Rule(lion, ("beta1", "weight1", "beta2", "weight2", "lr", "decay")),
    "tiger": Rule(tiger, ("keep", "weight", "eta", "decay")),
    "adamw": Rule(adamw, (*_ADAM, "decay")),
    "adam": Rule(adam, (*_ADAM, "weight_decay")),
    "adaxw": Rule(adaxw, (*_ADAX, "eps_t", "lr", "decay")),
    "adax": Rule(adax, (*_ADAX, "eps_t", "lr", "weight_decay")),
    "adaxw_inside": Rule(adaxw_inside, (*_ADAX, "eps", "lr", "decay")),
    "adax_inside": Rule(adax_inside, (*_ADAX, "eps", "lr", "weight_decay")),
}
