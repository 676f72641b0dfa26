"""Where a step stops: what tiles and chunks have left becomes sums of tensors."""

from __future__ import annotations

import triton
import triton.language as tl

from ... import schedule

# the fields of a summation
FIELDS = tl.constexpr(len(schedule.SUMMATION_FIELDS))
TO = tl.constexpr(schedule.SUMMATION_FIELDS.index("to"))
TENSOR = tl.constexpr(schedule.SUMMATION_FIELDS.index("tensor"))
FIRST = tl.constexpr(schedule.SUMMATION_FIELDS.index("first"))
SUMS = tl.constexpr(schedule.SUMMATION_FIELDS.index("sums"))
RUN = tl.constexpr(schedule.SUMMATION_FIELDS.index("run"))
RUN_STRIDE = tl.constexpr(schedule.SUMMATION_FIELDS.index("run_stride"))
PARTS = tl.constexpr(schedule.SUMMATION_FIELDS.index("parts"))
STRIDE = tl.constexpr(schedule.SUMMATION_FIELDS.index("stride"))
TIMES = tl.constexpr(schedule.SUMMATION_FIELDS.index("times"))
TIMES_STRIDE = tl.constexpr(schedule.SUMMATION_FIELDS.index("times_stride"))
TOGETHER = tl.constexpr(schedule.SUMMATION_FIELDS.index("together"))

LANES = tl.constexpr(schedule.SUMMING_THREADS)
NEIGHBOURS = tl.constexpr(schedule.NEIGHBOURS)
AHEAD = tl.constexpr(8)  # parts of a lane on their way at once


@triton.jit(do_not_specialize=["tensors", "blocks", "formats"])
def sum_parts(
    table,  # int64, as the passes have it, of `tensors` with `formats` formats each
    summations,  # int64 [summations][FIELDS]
    places,  # int32 [2][blocks]: summations, and which of its blocks a program is
    scratch,  # float64
    tensors,
    blocks,
    formats,
):
    """Some neighbouring sums at once. A group of lanes has one for each, and groups share the parts."""
    summation = summations + tl.load(places + tl.program_id(0)) * FIELDS
    together = tl.load(summation + TOGETHER)
    lanes = tl.arange(0, LANES).to(tl.int64)
    first = tl.load(places + blocks + tl.program_id(0)) * together
    at = first + lanes % together
    sums = tl.load(summation + SUMS)
    existing = at < sums
    run = tl.load(summation + RUN)
    place = tl.load(summation + FIRST) + at // run * tl.load(summation + RUN_STRIDE) + at % run
    tensor = tl.load(summation + TENSOR)
    group, groups = lanes // together, tl.full((), LANES, tl.int64) // together
    if tensor < 0:
        total = _sum_of_groups(scratch + place, summation, group, groups, existing)
    else:
        # without a gradient there may be no state
        active = tl.where(tl.load(table + formats * tensors + tensor) < 0, 0, sums)
        averages = tl.load(table + 2 * tensors + tensor).to(tl.pointer_type(tl.float32))
        total = _sum_of_groups(averages + place, summation, group, groups, at < active)
    to = scratch + tl.load(summation + TO)
    if together == LANES:
        tl.store(to + at, total, existing)
    elif together == 1:
        tl.store(to + first, tl.sum(total, 0))
    else:
        neighbours = first + tl.arange(0, NEIGHBOURS)
        of_groups = tl.sum(tl.reshape(total, (LANES // NEIGHBOURS, NEIGHBOURS)), 0)
        tl.store(to + neighbours, of_groups, neighbours < sums)


@triton.jit
def _sum_of_groups(parts, summation, group, groups, existing):
    """Of every `groups`th part, from a group's first on; a lane counts its place on, without a division."""
    length, stride = tl.load(summation + PARTS), tl.load(summation + STRIDE)
    times_stride = tl.load(summation + TIMES_STRIDE)
    count = length * tl.load(summation + TIMES)
    divisor = tl.maximum(length, 1)
    step = groups % divisor
    ahead = step * stride + groups // divisor * times_stride
    wrapped = times_stride - length * stride
    at = group % divisor
    parts += at * stride + group // divisor * times_stride
    total = tl.zeros((LANES,), tl.float64)
    for first in range(0, count, groups * AHEAD):
        for i in tl.static_range(AHEAD):
            there = existing & (first + i * groups + group < count)
            total += tl.load(parts, there, other=0.0).to(tl.float64)
            at += step
            beyond = at >= length
            at = tl.where(beyond, at - length, at)
            parts += ahead + tl.where(beyond, wrapped, 0)
    return total
