"""The norm over all gradients of a step, and the factor that clips it."""

from __future__ import annotations

import triton
import triton.language as tl

from .storage import larger, load

AT_ONCE = tl.constexpr(4096)  # sums that the last program adds together


@triton.jit
def squares(
    addresses,  # int64, of the gradients; 0 where there is none
    sizes,  # int64, elements of each gradient
    chunk_tensors,  # int32, the gradient that each program takes a chunk of
    chunk_indices,  # int32, which chunk
    sums,  # float64, one for each program
    DTYPE: tl.constexpr,  # of the gradients
    BLOCK: tl.constexpr,  # elements of one turn
    CHUNK: tl.constexpr,  # elements of a program
):
    """In float64, where the square of an fp32 number is exact."""
    tensor = tl.load(chunk_tensors + tl.program_id(0))
    start = tl.load(chunk_indices + tl.program_id(0)).to(tl.int64) * CHUNK
    address = tl.load(addresses + tensor)
    left = tl.minimum(tl.load(sizes + tensor) - start, CHUNK).to(tl.int32)
    left = tl.where(address == 0, 0, left)
    gradient = address.to(tl.pointer_type(DTYPE)) + start
    aligned = tl.multiple_of(gradient, 16)
    full = tl.where(gradient.to(tl.int64) % 16 == 0, left // BLOCK * BLOCK, 0)
    total = tl.zeros((BLOCK,), tl.float64)
    for at in range(0, full, BLOCK):
        x = load(aligned + at + tl.arange(0, BLOCK), None).to(tl.float64)
        total += x * x
    for at in range(full, left, BLOCK):
        offsets = at + tl.arange(0, BLOCK)
        x = tl.where(offsets < left, load(gradient + offsets, offsets < left), 0.0).to(tl.float64)
        total += x * x
    tl.store(sums + tl.program_id(0), tl.sum(total, 0))


@triton.jit(do_not_specialize=["count"])
def norm(
    sums,  # float64, of squares
    count,
    max_norm,  # float64
    grad_scale,  # fp32
    result,  # float64: the squares, then in fp32 the factor that unscales and clips
):
    total = tl.zeros((AT_ONCE,), tl.float64)
    for at in range(0, count, AT_ONCE):
        offsets = at + tl.arange(0, AT_ONCE)
        total += tl.load(sums + offsets, offsets < count, other=0.0)
    all_squares = tl.sum(total, 0)
    one = tl.full((), 1.0, tl.float64)
    factor = one / tl.load(grad_scale).to(tl.float64)
    excess = tl.sqrt(all_squares) * factor / tl.load(max_norm)
    tl.store(result, all_squares)
    clipped = (factor / larger(excess, one)).to(tl.float32)
    tl.store((result + 1).to(tl.pointer_type(tl.float32), bitcast=True), clipped)
