"""Parameters, gradients and states that lie over one memory."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from .sharding import PLAIN, local
from .spec import ParamSpec
from .state import COUNTERS


@dataclass
class _Range:
    """The bytes from a tensor's first element to its last; `index` is that of its spec."""

    device: torch.device
    begin: int
    end: int
    index: int
    what: str
    tensor: torch.Tensor

    @property
    def written(self) -> bool:
        return self.what != "gradient"

    @property
    def counts(self) -> bool:
        return any(self.what == f"state {name!r}" for name in COUNTERS)


def turns(specs: Sequence[ParamSpec], in_order: Sequence[bool]) -> list[int]:
    """When each parameter is stepped: all in turn 0, but those that write what others use one after the
    other, in the order of the specs. Those of which `in_order` is true may share a turn.

    Raises:
        ValueError: memory is shared in a way that has no right result; the message names the parameter.
    """
    found = [0] * len(specs)
    if _all_apart(specs):
        return found
    last: dict[int, tuple[int, bool]] = {}  # by group of ranges, the turn of its last spec
    shared: dict[int, list[int]] = {}  # by spec, its groups
    for number, group in enumerate(_overlapping(specs)):
        _check(specs, group)
        for index in {r.index for r in group}:
            shared.setdefault(index, []).append(number)
    for index in sorted(shared):
        for number in shared[index]:
            turn, together = last.get(number, (-1, False))
            found[index] = max(found[index], turn + 1 - (together and in_order[index]))
        for number in shared[index]:
            last[number] = found[index], in_order[index]
    return found


def _all_apart(specs: Sequence[ParamSpec]) -> bool:
    """Whether no two ranges overlap, by addresses alone, as in nearly all plans; never true by mistake."""
    begins: list[int] = []
    ends: list[int] = []

    def add(t: torch.Tensor) -> None:
        if type(t) in PLAIN and t.is_contiguous() and (size := t.nbytes):
            begin = t.data_ptr()
            begins.append(begin)
            ends.append(begin + size)
        else:
            for r in _range(0, "", t):
                begins.append(r.begin)
                ends.append(r.end)

    for spec in specs:
        add(spec.param)
        g = spec.param.grad
        if spec.takes_gradient and g is not None and g.layout == torch.strided:
            add(g)
        for name in spec.state_names:
            if name in spec.state:
                add(spec.state[name])
    # sorted each by itself: of ranges that are apart, each ends before the next one begins
    begins.sort()
    ends.sort()
    return all(map(operator.le, ends, begins[1:]))


def _overlapping(specs: Sequence[ParamSpec]) -> Iterator[list[_Range]]:
    """Groups of ranges that overlap, if any of them is written."""
    group: list[_Range] = []
    end = 0
    for r in sorted(_ranges(specs), key=lambda r: (str(r.device), r.begin)):
        if group and (r.device != group[0].device or r.begin >= end):
            if len(group) > 1 and any(r.written for r in group):
                yield group
            group, end = [], 0
        group.append(r)
        end = max(end, r.end)
    if len(group) > 1 and any(r.written for r in group):
        yield group


def _ranges(specs: Sequence[ParamSpec]) -> Iterator[_Range]:
    for i, spec in enumerate(specs):
        yield from _range(i, "parameter", spec.param)
        g = spec.param.grad
        if spec.takes_gradient and g is not None and g.layout == torch.strided:
            yield from _range(i, "gradient", g)
        for name in spec.state_names:
            if name in spec.state:
                yield from _range(i, f"state {name!r}", spec.state[name])


def _range(index: int, what: str, t: torch.Tensor) -> Iterator[_Range]:
    t = local(t)
    # what wraps other tensors has no memory of its own
    if t.numel() == 0 or type(t).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        return
    begin = t.data_ptr()
    reach = t.numel()
    if not t.is_contiguous():
        reach = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    yield _Range(t.device, begin, begin + reach * t.element_size(), index, what, t)


def _check(specs: Sequence[ParamSpec], group: list[_Range]) -> None:
    by_index: dict[int, list[_Range]] = {}
    for r in group:
        if r.counts:
            other = next(x for x in group if x is not r)
            raise ValueError(
                f"{specs[r.index].name}: {r.what} shares memory with the {_named(specs, r, other)}; each "
                "parameter needs a counter of its own, as load_state_dict makes it"
            )
        by_index.setdefault(r.index, []).append(r)
    for own in by_index.values():
        for i, a in enumerate(own):
            for b in own[i + 1 :]:
                if a.begin < b.end and b.begin < a.end and not _may_overlap(a, b):
                    raise ValueError(f"{specs[a.index].name}: {b.what} and {a.what} share memory")


def _may_overlap(a: _Range, b: _Range) -> bool:
    """Of one spec. A gradient may be what it updates: each element is read before it is written."""
    same = (a.begin, a.end, a.tensor.dtype) == (b.begin, b.end, b.tensor.dtype)
    return _has_gaps(a) or _has_gaps(b) or (same and not (a.written and b.written))


def _has_gaps(r: _Range) -> bool:
    return r.tensor.numel() * r.tensor.element_size() != r.end - r.begin


def _named(specs: Sequence[ParamSpec], r: _Range, other: _Range) -> str:
    what = other.what
    return what if other.index == r.index else f"{what} of {specs[other.index].name}"
