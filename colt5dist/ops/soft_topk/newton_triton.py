"""The exact soft top-k in Triton: `newton.solve` with one program a row, each of which ends with its own row.

Backward: the mean gradient of the unclipped mass, one program a row; then the gradient to the scores, one a tile.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
# (kernels: a type beside an argument would mean something else to Triton)

import torch
import triton
import triton.language as tl
from torch import Tensor

from colt5dist.ops.soft_topk import newton
from colt5dist.ops.soft_topk.operator import arithmetic_dtype, empty_result, register_newton
from colt5dist.ops.soft_topk.triton import TILE_BLOCK, output_kernel, row_arguments, row_block
from colt5dist.ops.soft_topk.triton_row import (
    as_rows,
    difference,
    float64_bits,
    float64_of,
    gradient_tile,
    row_extent,
    row_tile,
)


@triton.jit
def _add_mass(largest, total, below, inverse_eps):
    """Carry on (largest, sum of exp((x - largest) / eps)) by the entries of `below`, -inf where there is none."""
    raised = tl.maximum(largest, tl.max(below))
    pivot = tl.where(raised == float("-inf"), 0.0, raised)
    carried = total * tl.exp((largest - pivot) * inverse_eps).to(tl.float64)
    return raised, carried + tl.sum(tl.exp((below - pivot) * inverse_eps)).to(tl.float64)


@triton.jit
def _asinh(x):
    magnitude = tl.log(tl.abs(x) + tl.sqrt(x * x + 1.0))
    return tl.where(x < 0, -magnitude, magnitude)


@triton.jit
def _midpoint(low, high, eps):
    """`newton.midpoint`."""
    middle = (_asinh(low / eps) + _asinh(high / eps)) / 2
    return eps * (tl.exp(middle) - tl.exp(-middle)) / 2


@triton.jit(do_not_specialize=["eps", "accuracy"])
def _solve_kernel(
    scores,
    mask,
    k,
    roots,
    n,
    eps,
    accuracy,
    MAX_PASSES: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_MASK: tl.constexpr,
    DTYPE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    eps = float64_of(eps)
    accuracy = float64_of(accuracy)
    inverse_eps = (1.0 / eps).to(DTYPE)
    row_min, row_max, num_valid = row_extent(scores, mask, row, n, BLOCK, HAS_MASK, DTYPE)
    target = tl.load(k + row)
    target = tl.where(target > num_valid, num_valid, target)
    total = tl.full((), 0.0, tl.float64)
    for start in tl.range(0, n, BLOCK):
        tile, _valid, _columns = row_tile(scores, mask, row, start, n, BLOCK, HAS_MASK, DTYPE)
        total += tl.sum(tl.exp(difference(tile, row_max) * inverse_eps)).to(tl.float64)
    total = tl.where(total < 1, 1.0, total)
    high = -row_min
    low = tl.minimum(eps * (tl.log(target) - tl.log(total) - 16 * accuracy) - row_max, high)
    # rows that need no search: all of it is taken, or there is NaN in it or for its budget
    a = tl.where(target < num_valid, low, tl.where(target == num_valid, high, target))
    a = tl.where(row_max == row_max, a, row_max)
    active = ((target < num_valid) & (row_max == row_max)).to(tl.int32)
    passes = tl.full((), 0, tl.int32)
    while active > 0:
        num_clipped = tl.full((), 0, tl.int64)
        largest = tl.full((), float("-inf"), DTYPE)
        total = tl.full((), 0.0, tl.float64)
        for start in tl.range(0, n, BLOCK):
            tile, _valid, _columns = row_tile(scores, mask, row, start, n, BLOCK, HAS_MASK, DTYPE)
            offset = difference(tile, -a)
            num_clipped += tl.sum((offset >= 0).to(tl.int32)).to(tl.int64)
            below = tl.where(offset >= 0, float("-inf"), offset)
            largest, total = _add_mass(largest, total, below, inverse_eps)
        log_mass = tl.log(total) + tl.where(largest == float("-inf"), 0.0, largest).to(tl.float64) / eps
        remainder = target - num_clipped.to(tl.float64)
        step = eps * (tl.log(tl.where(remainder > 0, remainder, 1.0)) - log_mass)
        newton_a = tl.where(remainder > 0, a + step, float("-inf"))
        high = tl.where(newton_a < a, tl.minimum(high, a), high)
        low = tl.minimum(tl.maximum(low, newton_a - accuracy * tl.abs(newton_a - a)), high)
        resolution = eps * accuracy + 4.440892098500626e-16 * tl.abs(a)
        done = (tl.abs(newton_a - a) <= resolution) | (high - low <= resolution)
        bisect = (high - low > 4 * eps) & (passes % 2 == 0) & (done == 0)
        a = tl.where(bisect, _midpoint(low, high, eps), low)
        passes += 1
        active = ((done == 0) & (passes < MAX_PASSES)).to(tl.int32)
    tl.store(roots + row, a)


@triton.jit(do_not_specialize=["eps"])
def _mean_gradient_kernel(
    scores, mask, grad, roots, means, n, eps, BLOCK: tl.constexpr, HAS_MASK: tl.constexpr, DTYPE: tl.constexpr
):
    """Mean upstream gradient of the unclipped entries, weighted by y: 0 if there is none, NaN in a spoiled row."""
    row = tl.program_id(0).to(tl.int64)
    inverse_eps = (1.0 / float64_of(eps)).to(DTYPE)
    a = tl.load(roots + row)
    # y itself may vanish where its ratios do not: the weights are taken relative to the largest
    largest = tl.full((), float("-inf"), DTYPE)
    for start in tl.range(0, n, BLOCK):
        tile, _valid, _columns = row_tile(scores, mask, row, start, n, BLOCK, HAS_MASK, DTYPE)
        offset = difference(tile, -a)
        largest = tl.maximum(largest, tl.max(tl.where(offset < 0, offset, float("-inf"))))
    pivot = tl.where(largest == float("-inf"), 0.0, largest)
    total = tl.full((), 0.0, tl.float64)
    weighted = tl.full((), 0.0, tl.float64)
    for start in tl.range(0, n, BLOCK):
        tile, valid, columns = row_tile(scores, mask, row, start, n, BLOCK, HAS_MASK, DTYPE)
        offset = difference(tile, -a)
        free = valid & (offset < 0)
        weights = tl.exp(tl.where(free, offset - pivot, float("-inf")) * inverse_eps)
        total += tl.sum(weights).to(tl.float64)
        # float64: where one entry has nearly all the mass, its own gradient less this mean cancels
        weighted += tl.sum(weights.to(tl.float64) * gradient_tile(grad, row, columns, free, DTYPE).to(tl.float64))
    mean = tl.where(total > 0, weighted / tl.where(total > 0, total, 1.0), 0.0)
    tl.store(means + row, tl.where(a == a, mean, a))


@triton.jit(do_not_specialize=["eps"])
def _score_gradients_kernel(
    scores,
    mask,
    grad,
    roots,
    means,
    grad_scores,
    n,
    tiles,
    eps,
    BLOCK: tl.constexpr,
    HAS_MASK: tl.constexpr,
    DTYPE: tl.constexpr,
):
    row = (tl.program_id(0) // tiles).to(tl.int64)
    start = (tl.program_id(0) % tiles) * BLOCK
    inverse_eps = (1.0 / float64_of(eps)).to(DTYPE)
    mean = tl.load(means + row)
    tile, valid, columns = row_tile(scores, mask, row, start, n, BLOCK, HAS_MASK, DTYPE)
    upstream = gradient_tile(grad, row, columns, valid, DTYPE)
    offset = difference(tile, -tl.load(roots + row))
    clipped = offset >= 0
    gradient = tl.exp(tl.where(clipped, 0.0, offset) * inverse_eps) * inverse_eps * difference(upstream, mean)
    gradient = tl.where(clipped, 0.0, tl.where(valid, gradient, 0.0))
    tl.store(grad_scores + row * n + columns, gradient.to(grad_scores.dtype.element_ty), mask=columns < n)


@torch.library.custom_op("colt5dist::soft_topk_newton_triton_forward", mutates_args=())
def soft_topk_newton_triton_forward(
    scores: Tensor, k: Tensor, mask: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """As `soft_topk_newton_forward`."""
    n = scores.shape[-1]
    num_rows = scores.numel() // n
    tiles = triton.cdiv(n, TILE_BLOCK)
    rows, mask_rows, constants = row_arguments(scores, mask)
    eps_bits, accuracy_bits = float64_bits(eps), float64_bits(newton.tolerance(arithmetic_dtype(scores)))
    k = k.contiguous()
    roots = k.new_empty(k.shape)
    result = empty_result(scores)
    with torch.cuda.device_of(scores):
        solve = (rows, mask_rows, k, roots, n, eps_bits, accuracy_bits)
        _solve_kernel[(num_rows,)](*solve, MAX_PASSES=newton.MAX_PASSES, BLOCK=row_block(n), num_warps=8, **constants)
        output = (rows, mask_rows, roots, 1, result, n, tiles, eps_bits)
        output_kernel[(num_rows * tiles,)](*output, BLOCK=TILE_BLOCK, **constants)
    return result, roots


@torch.library.custom_op("colt5dist::soft_topk_newton_triton_backward", mutates_args=())
def soft_topk_newton_triton_backward(
    grad: Tensor, scores: Tensor, k: Tensor, mask: Tensor | None, a: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """As `soft_topk_newton_backward`."""
    n = scores.shape[-1]
    num_rows = scores.numel() // n
    tiles = triton.cdiv(n, TILE_BLOCK)
    rows, mask_rows, constants = row_arguments(scores, mask)
    grad_rows = as_rows(grad)
    eps_bits = float64_bits(eps)
    a = a.contiguous()
    means = k.new_empty(k.shape)
    grad_scores = torch.empty(scores.shape, dtype=scores.dtype, device=scores.device)
    with torch.cuda.device_of(scores):
        reduce = (rows, mask_rows, grad_rows, a, means, n, eps_bits)
        _mean_gradient_kernel[(num_rows,)](*reduce, BLOCK=row_block(n), num_warps=8, **constants)
        elements = (rows, mask_rows, grad_rows, a, means, grad_scores, n, tiles, eps_bits)
        _score_gradients_kernel[(num_rows * tiles,)](*elements, BLOCK=TILE_BLOCK, **constants)
    return grad_scores, means


register_newton(soft_topk_newton_triton_forward, soft_topk_newton_triton_backward)
