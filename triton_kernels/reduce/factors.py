"""What stands in the place of reduced states in the passes over elements: one or two numbers for a row, for a
column.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .work_item import BATCH, CHUNK, COLUMN_FACTORS, COLUMNS, ROW_FACTORS, ROWS, floats

EIGHT = tl.constexpr(8)  # neighbours, of 16 bits each in a wide access


@triton.jit
def factors_at(geometry, scratch, start, ALONG: tl.constexpr):
    """Where the element `start` is in its matrix, and the numbers of all rows and columns."""
    factors = ()
    if ALONG != "none":
        batch, rows, columns = (
            tl.load(geometry + BATCH),
            tl.load(geometry + ROWS),
            tl.load(geometry + COLUMNS),
        )
        of_rows, of_columns = (
            floats(scratch, geometry, ROW_FACTORS),
            floats(scratch, geometry, COLUMN_FACTORS),
        )
        factors = (of_rows, of_columns, start // columns, start % columns, batch, rows, columns)
    return factors


@triton.jit
def reduced_states(factors, offsets, mask, ALONG: tl.constexpr, EVEN: tl.constexpr):
    """What stands in the place of a rule's reduced states; EVEN: where all columns start at wide accesses."""
    states = ()
    if ALONG != "none":
        of_rows, of_columns, row, column, batch, rows, columns = factors
        further = wraps(offsets, column, columns)
        if ALONG != "columns":
            x = of_rows + (row + further)
            states = states + (tl.load(x, mask),)
            if ALONG == "rows":
                states = states + (tl.load(x + batch * rows, mask),)
        if ALONG != "rows":
            matrix = row // rows + wraps(further, row % rows, rows)
            at = column + offsets - further.to(tl.int64) * columns
            at += matrix * columns
            second = of_columns + batch * columns
            if EVEN:
                at = tl.max_contiguous(tl.multiple_of(at, EIGHT), EIGHT)
                second = tl.multiple_of(second, 16)
            states = states + (tl.load(of_columns + at, mask),)
            if ALONG == "columns":
                states = states + (tl.load(second + at, mask),)
    return states


@triton.jit
def wraps(offsets, first, period):
    """How often one comes to the next period, `offsets` on from `first` in one; for offsets below CHUNK.

    fp32's quotient of such numbers is off by far less than 1/2 of the divisor's inverse: with half an element
    more no rounding reaches the next whole number.
    """
    ahead = tl.minimum(period - first, CHUNK).to(tl.int32)
    divisor = tl.minimum(period, CHUNK).to(tl.int32)
    inverse = tl.div_rn(1.0, divisor.to(tl.float32))
    return (((offsets - ahead + divisor).to(tl.float32) + 0.5) * inverse).to(tl.int32)
