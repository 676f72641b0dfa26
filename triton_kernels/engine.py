"""The element-wise step: one kernel for every rule and every combination of dtypes. Knows no optimizer."""

from __future__ import annotations

import triton
import triton.language as tl

from .. import formats
from .formats import arrays_of, first_of, load_value, store_value

CHUNK_SIZE = 16384
NUM_WARPS = 4
# every operation rounded by itself, as on the other backends
OPTIONS = dict(num_warps=NUM_WARPS, enable_fp_fusion=False)


def block_size(names: tuple[str, ...], lanes: int) -> int:
    """Elements of one turn for warps of that many lanes: a thread has 16 bytes of the widest array.

    With 16-bit arrays beside fp32 it has 8 bytes of those; 16 of both would take an exchange of registers
    through shared memory. names: of formats.
    """
    return NUM_WARPS * lanes * (16 // formats.widest(names))


@triton.jit(do_not_specialize=["tensors", "stride"])
def apply_kernel(
    table,  # int64: for parameter, gradient and each state a row of addresses, then indices of coefficients,
    # further arrays of formats, places of first elements
    sizes,  # int64, elements of each tensor
    chunk_tensors,  # int32, the tensor that each program takes a chunk of
    chunk_indices,  # int32, which chunk
    coefficient_table,  # fp32: factor, store_params, then the coefficients
    clip,  # fp32, multiplies every gradient
    found_inf,  # fp32; not 0: change nothing
    tensors,  # how many
    stride,
    RULE: tl.constexpr,  # rule(p, g, states, coefficients) -> (amount to subtract, states)
    OUTCOME: tl.constexpr,  # what becomes of the amount: "subtracted", "assigned", "none"
    FORMATS: tl.constexpr,  # of parameter, gradient, states
    COEFFICIENTS: tl.constexpr,  # how many
    BLOCK: tl.constexpr,  # elements of one turn
    CHUNK: tl.constexpr,  # elements of a program
):
    tensor = tl.load(chunk_tensors + tl.program_id(0))
    start = tl.load(chunk_indices + tl.program_id(0)).to(tl.int64) * CHUNK
    index = tl.load(table + len(FORMATS) * tensors + tensor)
    left = tl.minimum(tl.load(sizes + tensor) - start, CHUNK).to(tl.int32)
    left = tl.where((index < 0) | (tl.load(found_inf) != 0), 0, left)

    own = coefficient_table + tl.maximum(index, 0) * stride
    factor = tl.load(own) * tl.load(clip)
    store_params = tl.load(own + 1) != 0
    coefficients = coefficients_of(own, COEFFICIENTS)

    first = first_of(table, tensor, tensors, start, FORMATS)
    arrays, aligned, bits = arrays_of(table, tensor, tensors, start, first, FORMATS, 0)

    # 16-byte accesses need both the hint and a loop without a mask
    full = tl.where(bits % 16 == 0, left // BLOCK * BLOCK, 0)
    for at in range(0, full, BLOCK):
        offsets = at + tl.arange(0, BLOCK)
        _update(aligned, offsets, None, factor, store_params, coefficients, RULE, OUTCOME, FORMATS)
    for at in range(full, left, BLOCK):
        offsets = at + tl.arange(0, BLOCK)
        _update(arrays, offsets, offsets < left, factor, store_params, coefficients, RULE, OUTCOME, FORMATS)


@triton.jit
def coefficients_of(own, COEFFICIENTS: tl.constexpr):
    coefficients = ()
    for i in tl.static_range(COEFFICIENTS):
        coefficients = coefficients + (tl.load(own + 2 + i),)
    return coefficients


@triton.jit
def _update(
    arrays,
    offsets,
    mask,
    factor,
    store_params,
    coefficients,
    RULE: tl.constexpr,
    OUTCOME: tl.constexpr,
    FORMATS: tl.constexpr,
):
    """The compiler drops loads of what the rule has no use for."""
    p = load_value(arrays, offsets, mask, 0, FORMATS)
    g = load_value(arrays, offsets, mask, 1, FORMATS) * factor
    states = ()
    for i in tl.static_range(2, len(FORMATS)):
        states = states + (load_value(arrays, offsets, mask, i, FORMATS),)
    amount, states = RULE(p, g, states, coefficients)
    if OUTCOME == "subtracted":
        amount = p - amount
    if OUTCOME != "none":  # noqa: SIM102  known when it is compiled, which the other condition is not
        if store_params:
            store_value(arrays, offsets, amount, mask, 0, FORMATS)
    for i in tl.static_range(2, len(FORMATS)):
        store_value(arrays, offsets, states[i - 2], mask, i, FORMATS)
