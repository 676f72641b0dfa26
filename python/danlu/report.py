"""Tables of which backend takes which parameter."""

from __future__ import annotations

from dataclasses import dataclass

from . import checks
from .backends import REFERENCE
from .backends.native import copies_gradient
from .describe import choose, describe, left_alone
from .plan import named_parameters
from .step_rule import StepRule


@dataclass(frozen=True)
class BackendChoice:
    """The backend of one parameter; `dtypes` are those of parameter, gradient and states.

    Of a parameter that no step touches, backend "none": it needs no gradient and could not be stepped.
    """

    name: str
    shape: tuple[int, ...]
    dtypes: tuple[str, ...]
    backend: str
    reason: str


class BackendReport(list[BackendChoice]):
    """One row for each parameter; as text, equal rows are counted together."""

    @classmethod
    def of(cls, optimizer: StepRule) -> BackendReport:
        rows = cls()
        for group, name, p in named_parameters(optimizer):
            alone = left_alone(optimizer, group, name, p)
            if alone is not None:
                shape = () if checks.is_uninitialized(p) else tuple(p.shape)
                dtype = str(p.dtype).removeprefix("torch.")
                rows.append(BackendChoice(name, shape, (dtype,), "none", f"left alone: {alone}"))
                continue
            spec = describe(optimizer, group, name, p)
            backend, reason = choose(optimizer, spec)
            if backend is not REFERENCE and copies_gradient(spec):
                reason += ", the gradient is copied to the parameter's strides"
            rows.append(BackendChoice(name, spec.shape, spec.formats, backend.name, reason))
        return rows

    def __str__(self) -> str:
        alike: dict[tuple[str, tuple[str, ...], str], list[str]] = {}
        for row in self:
            alike.setdefault((row.backend, row.dtypes, row.reason), []).append(row.name)
        lines = []
        for (backend, dtypes, reason), names in alike.items():
            which = names[0] if len(names) == 1 else f"{len(names)} parameters, the first is {names[0]}"
            lines.append(f"{backend:<10} {'/'.join(dtypes)}: {which} ({reason})")
        return "\n".join(lines) or "no parameters"
