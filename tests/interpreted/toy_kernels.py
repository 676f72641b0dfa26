"""The formats of tests/toy_formats.py in Triton."""

from __future__ import annotations

import triton
import triton.language as tl

from danlu.triton_kernels.formats import Format


@triton.jit
def load_halves(pointers, offsets, mask, first):
    high, low = pointers
    upper = tl.load((high + offsets).to(tl.pointer_type(tl.uint16), bitcast=True), mask=mask).to(tl.uint32)
    lower = tl.load((low + offsets).to(tl.pointer_type(tl.uint16), bitcast=True), mask=mask).to(tl.uint32)
    return ((upper << 16) | lower).to(tl.float32, bitcast=True)


@triton.jit
def store_halves(pointers, offsets, values, mask, first):
    high, low = pointers
    bits = values.to(tl.uint32, bitcast=True)
    tl.store((high + offsets).to(tl.pointer_type(tl.uint16), bitcast=True), (bits >> 16).to(tl.uint16), mask)
    tl.store((low + offsets).to(tl.pointer_type(tl.uint16), bitcast=True), bits.to(tl.uint16), mask)


@triton.jit
def mark(index):
    return (((index + 1).to(tl.uint64) * 0x9E3779B97F4A7C15) >> 32).to(tl.uint32)


@triton.jit
def load_marked(pointers, offsets, mask, first):
    bits = tl.load(pointers[0] + offsets, mask=mask).to(tl.uint32, bitcast=True)
    return (bits ^ mark(first + offsets)).to(tl.float32, bitcast=True)


@triton.jit
def store_marked(pointers, offsets, values, mask, first):
    bits = values.to(tl.uint32, bitcast=True) ^ mark(first + offsets)
    tl.store(pointers[0] + offsets, bits.to(tl.int32, bitcast=True), mask=mask)


FORMATS = {
    "halves": Format((tl.bfloat16, tl.int16), load_halves, store_halves),
    "marked": Format((tl.int32,), load_marked, store_marked, indexed=True),
}
