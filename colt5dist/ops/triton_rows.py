"""What the Triton kernels over rows share: arguments, reading a tile of a row, and the arithmetic of a row's scalars.

Conditions are written so that they are false for NaN where NaN has to be passed on; `tl.minimum` and `tl.max` would
drop it.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
# (kernels: a type beside an argument would mean something else to Triton)

import struct

import torch
import triton
import triton.language as tl
from torch import Tensor


def as_rows(tensor: Tensor) -> tuple[Tensor, int, int]:
    """A tensor (..., n) as a 2-D view (a copy only where there is no view), and its two strides."""
    view = tensor if tensor.dim() == 2 else tensor.reshape(-1, tensor.shape[-1])
    return view, view.stride(0), view.stride(1)


def row_arguments(scores: Tensor, mask: Tensor | None) -> tuple[Tensor | int, ...]:
    """Scores and mask (the scores again, which are not read as one, if there is none) as the kernels take them."""
    rows = as_rows(scores)
    return rows + (rows if mask is None else as_rows(mask))


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
def row_tile(source, row, start, n, BLOCK: tl.constexpr, HAS_MASK: tl.constexpr, DTYPE: tl.constexpr):
    """Columns start .. start + BLOCK of a row: the scores, -inf where masked or beyond n; which are valid; the columns.

    source: scores, their two strides, mask (not read without HAS_MASK), its two strides.
    """
    columns = (start + tl.arange(0, BLOCK)).to(tl.int64)
    valid = columns < n
    if HAS_MASK:
        valid = valid & (tl.load(source[3] + row * source[4] + columns * source[5], mask=valid, other=0) != 0)
    tile = tl.load(source[0] + row * source[1] + columns * source[2], mask=valid, other=0.0).to(DTYPE)
    return tl.where(valid, tile, float("-inf")), valid, columns


@triton.jit
def gradient_tile(grad, row_stride, column_stride, row, columns, valid, DTYPE: tl.constexpr):
    """The upstream gradient at valid columns, 0 elsewhere."""
    return tl.load(grad + row * row_stride + columns * column_stride, mask=valid, other=0.0).to(DTYPE)


@triton.jit
def split(value, DTYPE: tl.constexpr):
    """A float64 scalar as the sum of two of type DTYPE.

    `tile - high > low` then has the truth value of `tile > value` in float64: where the two sides are near each other
    the difference is exact.
    """
    high = value.to(DTYPE)
    return high, (value - high.to(tl.float64)).to(DTYPE)


@triton.jit
def difference(tile, pivot):
    """tile - pivot, of a float64 scalar, with the sign that float64 would give: `scalar_state.difference`."""
    high, low = split(pivot, tile.dtype)
    return (tile - high) - low


@triton.jit
def exp2(x, FLUSH: tl.constexpr):
    """2 ** x. FLUSH, for float32: results below 1e-38 are 0, which saves the instructions that denormal ones take."""
    if FLUSH:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return tl.exp2(x)


@triton.jit
def per_octave(eps, DTYPE: tl.constexpr):
    """log2(e) / eps: what turns a difference of scores into an exponent of 2; eps float64."""
    return 1.4426950408889634 / eps.to(DTYPE)


@triton.jit
def larger(one, other):
    """The larger of two scalars, NaN if one is NaN."""
    return tl.where((one > other) | (one != one), one, other)


@triton.jit
def log_of_sum(total):
    """Natural logarithm, as float64, of a sum >= 1 in the type of the elementwise arithmetic, or of NaN.

    A float32 sum is taken apart, so that the error is that of a logarithm in [0, log 2): float64's own logarithm takes
    a warp longer than an iteration's other work.
    """
    if total.dtype == tl.float64:
        return tl.log(total)
    bits = total.to(tl.int32, bitcast=True)
    exponent = (bits >> 23) - 127
    mantissa = ((bits & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)
    log = exponent.to(tl.float64) * 0.6931471805599453 + tl.log(mantissa).to(tl.float64)
    return tl.where(total == total, log, total.to(tl.float64))


INTERPRETED = not isinstance(exp2, triton.JITFunction)
"""Whether the kernels run in Triton's interpreter: TRITON_INTERPRET=1 when this module was imported."""
