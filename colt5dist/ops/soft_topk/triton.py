"""Soft top-k with one scalar of state a row, in Triton. `colt5dist.ops.soft_topk` derives what is computed.

Forward: the iterations, one program a row, which write the states that are kept; then the result, one program a tile.
Backward: the states between the kept ones, one program a segment of a row; the scalars A_t, one program a row; then the
gradient to the scores, one program a tile. The replay is the forward's kernel, compiled once for both since what
differs is not specialised, and so gives the same bits.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
# (kernels: a type beside an argument would mean something else to Triton)

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from colt5dist.ops.soft_topk.operator import empty_result, register_coordinate_descent
from colt5dist.ops.soft_topk.schedule import epsilon_schedule
from colt5dist.ops.soft_topk.triton_row import (
    Rows,
    arithmetic_type,
    as_rows,
    difference,
    float64_bits,
    float64_of,
    gradient_tile,
    row_extent,
    row_tile,
)

ROW_BLOCK = 4096
"""Most columns that a program which has a whole row holds at a time."""
TILE_BLOCK = 1024
"""Columns of a program that has a tile."""


@triton.jit
def _temperature(first_eps, log_decay, last_eps, iteration):
    """eps_t of `epsilon_schedule`, in closed form."""
    return tl.maximum(first_eps * tl.exp(log_decay * (iteration - 1)), last_eps)


@triton.jit(do_not_specialize=["n_iters", "segments", "kept", "first_eps", "log_decay", "last_eps"])
def _states_kernel(
    scores,
    mask,
    k,
    segment_states,
    states,
    counts,
    n,
    n_iters,
    segments,
    kept,
    first_eps,
    log_decay,
    last_eps,
    BLOCK: tl.constexpr,
    HAS_MASK: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Run one of the `segments` segments of a row's iterations, from the state that ends the one before it.

    segment_states (rows, segments) holds those states and is not read for the first segment. Written are the states and
    counts (rows, kept) of the iterations that would end one of `kept` segments.
    """
    row = (tl.program_id(0) // segments).to(tl.int64)
    segment = tl.program_id(0) % segments
    first = segment * n_iters // segments + 1
    last = (segment + 1) * n_iters // segments
    first_eps = float64_of(first_eps)
    log_decay = float64_of(log_decay)
    last_eps = float64_of(last_eps)
    log_k = tl.log(tl.load(k + row))
    _row_min, row_max, num_valid = row_extent(scores, mask, row, n, BLOCK, HAS_MASK, DTYPE)
    column = (first * kept + n_iters - 1) // n_iters - 1
    if segment == 0:
        a = first_eps * (log_k - tl.log(tl.where(num_valid < 1, 1.0, num_valid)))
        a = tl.where(row_max == row_max, a, row_max)
        if (column + 1) * n_iters // kept == 1:
            tl.store(states + row * kept + column, a)
            tl.store(counts + row * kept + column, tl.full((), 0, tl.int64))
            column += 1
        first += 1
    else:
        a = tl.load(segment_states + row * segments + segment - 1)
    for iteration in tl.range(first, last + 1):
        eps = _temperature(first_eps, log_decay, last_eps, iteration)
        inverse_eps = (1.0 / eps).to(DTYPE)
        pivot = tl.where(row_max > -a, -a, row_max)
        total = tl.full((), 0.0, tl.float64)
        num_clipped = tl.full((), 0, tl.int64)
        for start in tl.range(0, n, BLOCK):
            tile, _valid, _columns = row_tile(scores, mask, row, start, n, BLOCK, HAS_MASK, DTYPE)
            offset = difference(tile, pivot)
            clipped = offset > 0
            total += tl.sum(tl.exp(tl.where(clipped, 0.0, offset) * inverse_eps)).to(tl.float64)
            num_clipped += tl.sum(clipped.to(tl.int32)).to(tl.int64)
        # the largest term is exactly 1, so only a row without a valid entry is below that
        a = eps * (log_k - tl.log(tl.where(total < 1, 1.0, total))) - pivot
        if (column + 1) * n_iters // kept == iteration:
            tl.store(states + row * kept + column, a)
            tl.store(counts + row * kept + column, num_clipped)
            column += 1


@triton.jit(do_not_specialize=["states_stride", "eps"])
def output_kernel(
    scores,
    mask,
    states,
    states_stride,
    result,
    n,
    tiles,
    eps,
    BLOCK: tl.constexpr,
    HAS_MASK: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """exp(min(s + a, 0) / eps), a being the last of the row's `states_stride` states; 0 where masked."""
    row = (tl.program_id(0) // tiles).to(tl.int64)
    start = (tl.program_id(0) % tiles) * BLOCK
    tile, valid, columns = row_tile(scores, mask, row, start, n, BLOCK, HAS_MASK, DTYPE)
    offset = difference(tile, -tl.load(states + (row + 1) * states_stride - 1))
    selected = tl.exp(tl.where(offset > 0, 0.0, offset) * (1.0 / float64_of(eps)).to(DTYPE))
    tl.store(result + row * n + columns, tl.where(valid, selected, 0.0), mask=columns < n)


@triton.jit
def _direct_gradient(tile, upstream, a, eps, DTYPE: tl.constexpr):
    """d_i, and s_i + a."""
    offset = difference(tile, -a)
    inverse_eps = (1.0 / eps).to(DTYPE)
    direct = upstream * tl.exp(tl.where(offset > 0, 0.0, offset) * inverse_eps) * inverse_eps
    return tl.where(offset > 0, 0.0, direct), offset


@triton.jit(do_not_specialize=["n_iters", "first_eps", "log_decay", "last_eps"])
def _scalar_gradients_kernel(
    scores,
    mask,
    grad,
    k,
    states,
    counts,
    shares,
    grad_k,
    n,
    n_iters,
    first_eps,
    log_decay,
    last_eps,
    BLOCK: tl.constexpr,
    HAS_MASK: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """shares[row, t - 1] = A_t / k for t = 2 .. T, and dL/dk."""
    row = tl.program_id(0).to(tl.int64)
    first_eps = float64_of(first_eps)
    log_decay = float64_of(log_decay)
    last_eps = float64_of(last_eps)
    budget = tl.load(k + row)
    a = tl.load(states + (row + 1) * n_iters - 1)
    eps = _temperature(first_eps, log_decay, last_eps, n_iters + 1)
    grad_a = tl.full((), 0.0, tl.float64)
    for start in tl.range(0, n, BLOCK):
        tile, valid, columns = row_tile(scores, mask, row, start, n, BLOCK, HAS_MASK, DTYPE)
        direct, _offset = _direct_gradient(tile, gradient_tile(grad, row, columns, valid, DTYPE), a, eps, DTYPE)
        grad_a += tl.sum(tl.where(valid, direct, 0.0)).to(tl.float64)
    budget_gradient = tl.full((), 0.0, tl.float64)
    for passed in tl.range(0, n_iters - 1):
        step = n_iters - 1 - passed
        eps = _temperature(first_eps, log_decay, last_eps, step + 1)
        previous = tl.load(states + row * n_iters + step - 1)
        num_clipped = tl.load(counts + row * n_iters + step).to(tl.float64)
        tl.store(shares + row * n_iters + step, grad_a / budget)
        budget_gradient += grad_a * eps / budget
        # clipped entries have a weight below 1 in all; where there are none, the exponential may overflow
        weight = tl.where(num_clipped > 0, num_clipped * tl.exp((a - previous) / eps), 0.0)
        grad_a = grad_a * weight / budget
        a = previous
    budget_gradient += grad_a * _temperature(first_eps, log_decay, last_eps, 1) / budget
    tl.store(grad_k + row, budget_gradient)


@triton.jit(do_not_specialize=["n_iters", "first_eps", "log_decay", "last_eps"])
def _score_gradients_kernel(
    scores,
    mask,
    grad,
    states,
    shares,
    grad_scores,
    n,
    tiles,
    n_iters,
    first_eps,
    log_decay,
    last_eps,
    BLOCK: tl.constexpr,
    HAS_MASK: tl.constexpr,
    DTYPE: tl.constexpr,
):
    row = (tl.program_id(0) // tiles).to(tl.int64)
    start = (tl.program_id(0) % tiles) * BLOCK
    first_eps = float64_of(first_eps)
    log_decay = float64_of(log_decay)
    last_eps = float64_of(last_eps)
    tile, valid, columns = row_tile(scores, mask, row, start, n, BLOCK, HAS_MASK, DTYPE)
    upstream = gradient_tile(grad, row, columns, valid, DTYPE)
    a = tl.load(states + (row + 1) * n_iters - 1)
    eps = _temperature(first_eps, log_decay, last_eps, n_iters + 1)
    gradient, offset = _direct_gradient(tile, upstream, a, eps, DTYPE)
    for passed in tl.range(0, n_iters - 1):
        step = n_iters - 1 - passed
        eps = _temperature(first_eps, log_decay, last_eps, step + 1)
        share = tl.load(shares + row * n_iters + step).to(DTYPE)
        softmax = tl.exp(offset * (1.0 / eps).to(DTYPE))
        offset = difference(tile, -tl.load(states + row * n_iters + step - 1))
        gradient -= tl.where(offset > 0, 0.0, share * softmax)
    gradient = tl.where(valid, gradient, 0.0)
    tl.store(grad_scores + row * n + columns, gradient.to(grad_scores.dtype.element_ty), mask=columns < n)


INTERPRETED = not isinstance(_states_kernel, triton.JITFunction)
"""Whether the kernels run in Triton's interpreter: TRITON_INTERPRET=1 when this module was imported."""


def row_block(n: int) -> int:
    """Columns that a program which has a whole row of n holds at a time."""
    return min(triton.next_power_of_2(n), ROW_BLOCK)


def row_arguments(scores: Tensor, mask: Tensor | None) -> tuple[Rows, Rows, dict]:
    """Scores, mask (scores, which are then not read as one, if there is none) and the constants of every kernel."""
    constants = {"HAS_MASK": mask is not None, "DTYPE": arithmetic_type(scores)}
    return as_rows(scores), as_rows(scores if mask is None else mask), constants


def _schedule_arguments(eps: float, eps_init: float, eps_decay: float) -> tuple[int, int, int]:
    return float64_bits(max(eps_init, eps)), float64_bits(math.log(eps_decay)), float64_bits(eps)


@torch.library.custom_op("colt5dist::soft_topk_triton_forward", mutates_args=())
def soft_topk_triton_forward(
    scores: Tensor,
    k: Tensor,
    mask: Tensor | None,
    eps: float,
    eps_init: float,
    eps_decay: float,
    n_iters: int,
    segments: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `soft_topk_scalar_forward`."""
    n = scores.shape[-1]
    num_rows = scores.numel() // n
    tiles = triton.cdiv(n, TILE_BLOCK)
    rows, mask_rows, constants = row_arguments(scores, mask)
    schedule = _schedule_arguments(eps, eps_init, eps_decay)
    result_eps = float64_bits(epsilon_schedule(eps, eps_init, eps_decay, n_iters)[-1])
    k = k.contiguous()
    result = empty_result(scores)
    kept_a = k.new_empty((*scores.shape[:-1], segments))
    kept_clipped = k.new_empty((*scores.shape[:-1], segments), dtype=torch.int64)
    with torch.cuda.device_of(scores):
        states = (rows, mask_rows, k, kept_a, kept_a, kept_clipped, n, n_iters, 1, segments, *schedule)
        _states_kernel[(num_rows,)](*states, BLOCK=row_block(n), num_warps=8, **constants)
        output = (rows, mask_rows, kept_a, segments, result, n, tiles, result_eps)
        output_kernel[(num_rows * tiles,)](*output, BLOCK=TILE_BLOCK, **constants)
    return result, kept_a, kept_clipped


@torch.library.custom_op("colt5dist::soft_topk_triton_backward", mutates_args=())
def soft_topk_triton_backward(
    grad: Tensor,
    scores: Tensor,
    k: Tensor,
    mask: Tensor | None,
    kept_a: Tensor,
    kept_clipped: Tensor,
    eps: float,
    eps_init: float,
    eps_decay: float,
    n_iters: int,
) -> tuple[Tensor, Tensor]:
    """As `soft_topk_scalar_backward`."""
    n = scores.shape[-1]
    num_rows = scores.numel() // n
    segments = kept_a.shape[-1]
    tiles = triton.cdiv(n, TILE_BLOCK)
    rows, mask_rows, constants = row_arguments(scores, mask)
    grad_rows = as_rows(grad)
    schedule = _schedule_arguments(eps, eps_init, eps_decay)
    k, states, counts = k.contiguous(), kept_a.contiguous(), kept_clipped.contiguous()
    shares = k.new_empty((num_rows, n_iters))
    grad_k = k.new_empty(k.shape)
    grad_scores = torch.empty(scores.shape, dtype=scores.dtype, device=scores.device)
    with torch.cuda.device_of(scores):
        if segments < n_iters:
            segment_states = states
            states, counts = torch.empty_like(shares), torch.empty_like(shares, dtype=torch.int64)
            replay = (rows, mask_rows, k, segment_states, states, counts, n, n_iters, segments, n_iters, *schedule)
            _states_kernel[(num_rows * segments,)](*replay, BLOCK=row_block(n), num_warps=8, **constants)
        scalars = (rows, mask_rows, grad_rows, k, states, counts, shares, grad_k, n, n_iters, *schedule)
        _scalar_gradients_kernel[(num_rows,)](*scalars, BLOCK=row_block(n), num_warps=8, **constants)
        elements = (rows, mask_rows, grad_rows, states, shares, grad_scores, n, tiles, n_iters, *schedule)
        _score_gradients_kernel[(num_rows * tiles,)](*elements, BLOCK=TILE_BLOCK, **constants)
    return grad_scores, grad_k


register_coordinate_descent(soft_topk_triton_forward, soft_topk_triton_backward)
