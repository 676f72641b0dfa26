"""What backends with native lists of parameters share: which tensors they take, and a step up to its run."""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch

from .. import checks, formats, state
from ..grad_norm import sum_of_squares
from ..listed_rows import ListedRows, listed_rows
from ..sharding import local, sharded_alike
from ..spec import ParamSpec
from ..step_rule import StepRule

# the engine's own words in front of every coefficients: factor, store_params
HEADER_FLOATS = 2

if TYPE_CHECKING:
    from .._step_list import StepList


def refusal_of_tensors(spec: ParamSpec) -> str | None:
    """Why no native list can take the parameter, whatever its dtypes; None if one can."""
    p = local(spec.param)
    if type(p).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        return f"the parameter is a {type(p).__name__}"
    if p.is_neg():
        return "the parameter is a lazily negated view"
    if not checks.is_dense(p):
        return f"the parameter is not dense (shape {spec.shape}, strides {spec.strides})"
    if any(formats.named(name).indexed for name in spec.formats) and not p.is_contiguous():
        return f"a format needs the places of elements, strides {spec.strides} are not contiguous"
    if spec.sparse_mode is not None and not p.is_contiguous():
        return f"the rows of a lazy parameter are not contiguous (strides {spec.strides})"
    if spec.sparse_mode is not None and spec.reduces:
        return "no kernel sums over a lazy parameter"
    if spec.matrix is None:
        return f"the rule sums over dimensions of {spec.shape} that are no rows or columns in memory"
    if spec.matrix[:2] != (1, 1) and not p.is_contiguous():
        return f"the rule sums over rows or columns, strides {spec.strides} are not contiguous"
    for name in spec.state_names:
        if name in state.COUNTERS and name in spec.state and spec.state[name].ndim:
            return f"state {name!r} has shape {tuple(spec.state[name].shape)}"
    for what, t in _companions(spec):  # their strides are no matter: a copy has the parameter's
        if type(local(t)) is not torch.Tensor:
            return f"the {what} is a {type(local(t)).__name__}"
    return None


def why_missing(name: str, error: ImportError, hint: str = "") -> str:
    """Why there is no native module of that name: it was not built, or it does not load."""
    if isinstance(error, ModuleNotFoundError) and error.name == f"danlu.{name}":
        return f"danlu.{name} was not built{hint}"
    return f"danlu.{name} cannot be imported ({error})"


def copies_gradient(spec: ParamSpec) -> bool:
    """Whether a native list reads a copy of the gradient, which lies otherwise than the parameter."""
    g = spec.gradient if spec.takes_gradient else None
    if g is None or g.layout != torch.strided:
        return False
    return not _looks_like(local(g), local(spec.param))


class CoefficientNames(Protocol):
    """What knows the rules of a backend: a native module, say."""

    def coefficient_names(self, rule: str, /) -> tuple[str, ...] | None:
        """In the order in which the kernel reads them; None if there is no such rule."""
        ...


class NativeExecutor:
    """A native list of parameters, which borrows every object: the specs here keep them alive."""

    captured = False
    finds_rows = True  # whether the kernels look which rows of a dense gradient take part

    def __init__(
        self,
        native: StepList,
        rules: CoefficientNames,
        optimizer: StepRule,
        specs: Sequence[ParamSpec],
    ) -> None:
        self._list = native
        self._specs = specs
        self._names = {rule: rules.coefficient_names(rule) for rule in {spec.rule for spec in specs}}
        self._params = [spec.param for spec in specs]
        self._writes = optimizer.outcome != "none"
        self._structures = {
            spec.group: optimizer.structure(optimizer.param_groups[spec.group]) for spec in specs
        }
        self._sets: dict[tuple[int, Hashable], ParamSpec] = {}  # by group and variant, a spec of each
        for spec in specs:
            spec.coefficients_index = self._coefficients_index(spec)
            native.add(spec)
        native.bind(optimizer.state)
        self._lazy = [(i, spec) for i, spec in enumerate(specs) if spec.sparse_mode is not None]
        self._listed: list[tuple[int, ListedRows]] = []  # of this step, by the parameter's index
        self._needed: list[tuple[int, float, float]] = []

    def refresh(self, optimizer: StepRule) -> bool:
        for index, structure in self._structures.items():
            if structure != optimizer.structure(optimizer.param_groups[index]):
                return False
        if not self._list_rows():
            return False
        addresses = [
            (
                i,
                _address(values),
                len(values),
                _address(rows),
                len(rows),
                _address(permutation),
                _address(offsets),
            )
            for i, (rows, values, permutation, offsets) in self._listed
        ]
        keys = self._list.refresh(optimizer.state, addresses, self._copy_gradient)
        if keys is None:
            return False
        self._needed = keys
        return True

    def gradient_squares(self) -> torch.Tensor | float:
        return sum_of_squares([g for g in (spec.gradient for spec in self._specs) if g is not None])

    def clip_factor(self, grad_scale: torch.Tensor | None) -> torch.Tensor | None:
        return None

    def release(self) -> None:
        self._list.release()
        self._listed.clear()

    def coefficients(self, optimizer: StepRule, factor: float) -> list[tuple[float, ...]]:
        """The coefficients that `refresh` found this step to need."""
        specs = list(self._sets.values())
        return [self._folded(optimizer, factor, specs[i], *counters) for i, *counters in self._needed]

    def active(self) -> list[bool] | None:
        """Which parameters have a gradient in this step; None if all have."""
        return None if self._list.active() == len(self._params) else self._list.mask()

    def count_writes(self, active: Sequence[bool] | None) -> None:
        """Tells autograd which parameters this step writes."""
        if not self._writes:
            return
        torch.autograd.graph.increment_version(
            self._params if active is None else _where(self._params, active)
        )

    def checked_names(self, rule: str, values: dict[str, Any]) -> dict[str, Any]:
        """The coefficients as Python gives them; raises unless they are those that the kernel reads."""
        names = self._names[rule]
        if tuple(values) != names:
            raise RuntimeError(f"rule {rule!r} takes the coefficients {names}, Python gives {tuple(values)}")
        return values

    def _list_rows(self) -> bool:
        """Reads the rows of lazy parameters; False if a gradient is not what the plan recorded."""
        self._listed.clear()
        for i, spec in self._lazy:
            g = spec.param.grad
            if g is None:
                continue
            g = local(g)
            if g.layout == torch.strided:
                if self.finds_rows and spec.rows is None:
                    continue
                if not _looks_like(g, local(spec.param)):
                    g = self._copy_gradient(i)
                    if g is None:
                        return False
            listed = self.rows_of(spec, g)
            if str(listed.values.dtype) != f"torch.{spec.formats[1]}":
                return False
            self._listed.append((i, listed))
        return True

    def _copy_gradient(self, i: int) -> torch.Tensor | None:
        """The gradient with the parameter's strides; None unless it is as recorded in all else."""
        spec = self._specs[i]
        p, g = spec.param, spec.param.grad
        if g is None or not sharded_alike(p, g):
            return None
        p, g = local(p), local(g)
        recorded = (torch.Tensor, torch.strided, p.shape, p.device, f"torch.{spec.formats[1]}")
        if (type(g), g.layout, g.shape, g.device, str(g.dtype)) != recorded:
            return None
        return torch.empty_like(p, dtype=g.dtype, requires_grad=False).copy_(g)

    def rows_of(self, spec: ParamSpec, g: torch.Tensor) -> ListedRows:
        """Of a gradient that lists them, or of any if the kernels do not find rows themselves; the numbers
        on the host, the values on the parameter's device. Raises if it is none of the parameter.
        """
        if spec.rows is not None:
            return ListedRows(spec.rows, g.detach(), spec.rows, None)
        checks.listed_rows(spec.name, spec.param, g)
        checks.row_numbers(spec.name, spec.param, g._indices()[0])
        return listed_rows(g)

    def _coefficients_index(self, spec: ParamSpec) -> int:
        first = self._sets.setdefault((spec.group, spec.variant), spec)
        if self._names[first.rule] != self._names[spec.rule]:
            raise RuntimeError(f"rules {first.rule!r} and {spec.rule!r} take different coefficients")
        return len(self._sets) - 1 if first is spec else first.coefficients_index

    def _folded(
        self, optimizer: StepRule, factor: float, spec: ParamSpec, step: float, micro_step: float
    ) -> tuple[float, ...]:
        group = optimizer.param_groups[spec.group]
        folded = optimizer.fold(group, step, micro_step, variant=spec.variant)
        values = self.checked_names(spec.rule, folded)
        store_params = bool(optimizer.moves(group)) and micro_step + 1 >= spec.accumulation_steps
        return (optimizer.sign(group) * factor, float(store_params), *values.values())


def exchange_api() -> object:
    """DLPack's C exchange API where torch has it; DANLU_DLPACK=0 turns it off."""
    if os.environ.get("DANLU_DLPACK") == "0":
        return None
    return getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)


def _address(t: torch.Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _where(items: Sequence[Any], mask: Sequence[bool]) -> list[Any]:
    return [item for item, chosen in zip(items, mask, strict=True) if chosen]


def _companions(spec: ParamSpec) -> Iterator[tuple[str, torch.Tensor]]:
    """The gradient of the parameter and its states, as far as there are any."""
    g = spec.param.grad
    if spec.takes_gradient and g is not None and g.layout == torch.strided:
        yield "gradient", g
    for name in spec.state_names:
        if name in spec.state and name not in state.COUNTERS:
            yield f"state {name!r}", spec.state[name]


def _looks_like(g: torch.Tensor, p: torch.Tensor) -> bool:
    """Whether a native list may read a dense gradient of the parameter by its address."""
    plain = type(g) is torch.Tensor and not g.is_neg()
    return plain and g.device == p.device and g.shape == p.shape and state.same_strides(p, g)
