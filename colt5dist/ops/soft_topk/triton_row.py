"""What the Triton kernels of soft top-k share: reading a tile of a row, and the arithmetic of a row's scalars.

One program has a row, or a tile of a row: none waits for another, and a row may have any length. Conditions are written
so that they are false for NaN where NaN has to be passed on; `tl.minimum` and `tl.max` would drop it.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
# (kernels: a type beside an argument would mean something else to Triton)

import struct
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Rows(NamedTuple):
    """A tensor (..., n) as the kernels take it: a 2-D view (a copy only where there is no view) and its strides."""

    tensor: Tensor
    row_stride: int
    column_stride: int


def as_rows(tensor: Tensor) -> Rows:
    view = tensor.reshape(-1, tensor.shape[-1])
    return Rows(view, view.stride(0), view.stride(1))


def float64_bits(value: float) -> int:
    """A float64 as an integer argument; Triton passes Python's floats on as float32."""
    return struct.unpack("<q", struct.pack("<d", value))[0]


def arithmetic_type(scores: Tensor) -> tl.dtype:
    """Triton's name of `arithmetic_dtype`."""
    return tl.float64 if scores.dtype == torch.float64 else tl.float32


@triton.jit
def float64_of(bits):
    return bits.to(tl.int64).to(tl.float64, bitcast=True)


@triton.jit
def row_tile(scores, mask, row, start, n, BLOCK: tl.constexpr, HAS_MASK: tl.constexpr, DTYPE: tl.constexpr):
    """Columns start .. start + BLOCK: the scores, -inf where masked or beyond n; which are valid; the columns."""
    columns = (start + tl.arange(0, BLOCK)).to(tl.int64)
    valid = columns < n
    if HAS_MASK:
        pointers = mask.tensor + row * mask.row_stride + columns * mask.column_stride
        valid = valid & (tl.load(pointers, mask=valid, other=0) != 0)
    pointers = scores.tensor + row * scores.row_stride + columns * scores.column_stride
    tile = tl.load(pointers, mask=valid, other=0.0).to(DTYPE)
    return tl.where(valid, tile, float("-inf")), valid, columns


@triton.jit
def gradient_tile(grad, row, columns, valid, DTYPE: tl.constexpr):
    """The upstream gradient at valid columns, 0 elsewhere."""
    pointers = grad.tensor + row * grad.row_stride + columns * grad.column_stride
    return tl.load(pointers, mask=valid, other=0.0).to(DTYPE)


@triton.jit
def difference(tile, pivot):
    """tile - pivot, of a float64 scalar, with the sign that float64 would give: `scalar_state.difference`."""
    high = pivot.to(tile.dtype)
    low = (pivot - high.to(tl.float64)).to(tile.dtype)
    return (tile - high) - low


@triton.jit
def row_extent(scores, mask, row, n, BLOCK: tl.constexpr, HAS_MASK: tl.constexpr, DTYPE: tl.constexpr):
    """Smallest and largest valid score (0 if there is none, NaN if one is NaN), number of valid ones: all float64."""
    smallest = tl.full((), float("inf"), tl.float64)
    largest = tl.full((), float("-inf"), tl.float64)
    num_valid = tl.full((), 0, tl.int64)
    num_nan = tl.full((), 0, tl.int64)
    for start in tl.range(0, n, BLOCK):
        tile, valid, _columns = row_tile(scores, mask, row, start, n, BLOCK, HAS_MASK, DTYPE)
        number = tile == tile
        smallest = tl.minimum(smallest, tl.min(tl.where(valid & number, tile, float("inf"))).to(tl.float64))
        largest = tl.maximum(largest, tl.max(tl.where(number, tile, float("-inf"))).to(tl.float64))
        num_valid += tl.sum(valid.to(tl.int32)).to(tl.int64)
        num_nan += tl.sum((tile != tile).to(tl.int32)).to(tl.int64)
    neither = tl.where(num_nan > 0, float("nan"), 0.0).to(tl.float64)
    known = (num_valid > 0) & (num_nan == 0)
    return tl.where(known, smallest, neither), tl.where(known, largest, neither), num_valid.to(tl.float64)
