"""The exact soft top-k in Triton: `newton.solve`, each row until it has converged, laid out as `triton` lays rows out.

Backward: the mean gradient of the unclipped mass in parts, one program a tile; then the gradient to the scores.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
# (kernels: a type beside an argument would mean something else to Triton)

import torch
import triton
import triton.language as tl
from torch import Tensor

from colt5dist.ops.row_split import exchange
from colt5dist.ops.soft_topk import newton
from colt5dist.ops.soft_topk.operator import arithmetic_dtype, define_newton, empty_budget_gradient, empty_result
from colt5dist.ops.soft_topk.triton import (
    MOST_TERMS,
    TILE_BLOCK,
    constants,
    extent,
    largest_of,
    load_budget,
    split_of,
    sum_both,
    write_result,
)
from colt5dist.ops.triton_rows import (
    as_rows,
    difference,
    exp2,
    float64_bits,
    float64_of,
    gradient_tile,
    larger,
    log_of_sum,
    per_octave,
    row_arguments,
    row_tile,
    split,
)

_SMALLEST_MASS = tl.constexpr(1e-30)
"""Unclipped mass below which it is taken relative to its largest term: it must not vanish."""


@triton.jit
def _asinh(x):
    magnitude = tl.log(tl.abs(x) + tl.sqrt(x * x + 1.0))
    return tl.where(x < 0, -magnitude, magnitude)


@triton.jit
def _midpoint(low, high, eps):
    """`newton.midpoint`."""
    middle = (_asinh(low / eps) + _asinh(high / eps)) / 2
    return eps * (tl.exp(middle) - tl.exp(-middle)) / 2


@triton.jit
def _unclipped_sums(tile, high, low, pivot, scale, COMPILED: tl.constexpr):
    """Sum of 2 ** ((s - high - pivot) * scale) over the scores below high + low, and number of the others."""
    offset = tile - high
    clipped = offset >= low
    terms = tl.where(clipped, 0.0, exp2((offset - pivot) * scale, COMPILED and tile.dtype == tl.float32))
    return sum_both(terms, clipped, COMPILED)


@triton.jit
def _largest_below(tile, high, low):
    """Largest s - high of the scores below high + low, -inf if there is none."""
    offset = tile - high
    return tl.max(tl.where(offset >= low, float("-inf"), offset))


@triton.jit(do_not_specialize=["num_rows", "parts", "blocks", "budget_bits", "eps", "accuracy"])
def _solve_kernel(
    scores,
    row_stride,
    column_stride,
    mask,
    mask_row_stride,
    mask_column_stride,
    k,
    budget_bits,
    roots,
    result,
    messages,
    num_rows,
    n,
    parts,
    blocks,
    eps,
    accuracy,
    MAX_PASSES: tl.constexpr,
    BLOCK: tl.constexpr,
    RESIDENT: tl.constexpr,
    LANES: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_K: tl.constexpr,
    DTYPE: tl.constexpr,
    COMPILED: tl.constexpr,
):
    source = (scores, row_stride, column_stride, mask, mask_row_stride, mask_column_stride)
    part = tl.program_id(0) % parts
    eps = float64_of(eps)
    accuracy = float64_of(accuracy)
    scale = per_octave(eps, DTYPE)
    there = tl.arange(0, LANES) < parts
    begin = part * blocks * BLOCK
    sequence = 0
    for task in tl.range(tl.program_id(0) // parts, num_rows, tl.num_programs(0) // parts):
        row = tl.full((), 0, tl.int64) + task
        group = tl.program_id(0) // parts
        tile, valid, columns = row_tile(source, row, begin, n, BLOCK, HAS_MASK, DTYPE)
        largest, num_valid = extent(tile, valid)
        smallest = tl.min(tl.where(valid, tile, float("inf")))
        if not RESIDENT:
            for block in tl.range(1, blocks):
                streamed, streamed_valid, _columns = row_tile(
                    source, row, begin + block * BLOCK, n, BLOCK, HAS_MASK, DTYPE
                )
                streamed_largest, streamed_number = extent(streamed, streamed_valid)
                largest = larger(largest, streamed_largest)
                num_valid += streamed_number
                smallest = tl.minimum(smallest, tl.min(tl.where(streamed_valid, streamed, float("inf"))))
        if LANES > 1:
            sequence += 1
            values, numbers = exchange(messages, group, part, parts, sequence, largest, num_valid, LANES)
            largest = largest_of(values, there)
            num_valid = tl.sum(numbers)
            sequence += 1
            values, numbers = exchange(messages, group, part, parts, sequence, smallest, num_valid, LANES)
            smallest = tl.min(tl.where(there, values, float("inf")))
        row_max = tl.where(num_valid == 0, 0.0, largest).to(tl.float64)
        row_min = tl.where(num_valid == 0, 0.0, smallest).to(tl.float64)
        all_valid = num_valid.to(tl.float64)
        target = load_budget(k, row, budget_bits, HAS_K)
        target = tl.where(target > all_valid, all_valid, target)

        # one pass with everything but the largest below the threshold: the logsumexp of the row
        high, low = split(row_max, DTYPE)
        total, equal = _unclipped_sums(tile, high, low, tl.full((), 0.0, DTYPE), scale, COMPILED)
        if not RESIDENT:
            wide = total.to(tl.float64)
            for block in tl.range(1, blocks):
                streamed, _valid, _columns = row_tile(source, row, begin + block * BLOCK, n, BLOCK, HAS_MASK, DTYPE)
                more, more_equal = _unclipped_sums(streamed, high, low, tl.full((), 0.0, DTYPE), scale, COMPILED)
                wide += more.to(tl.float64)
                equal += more_equal
            total = wide.to(DTYPE)
        if LANES > 1:
            sequence += 1
            values, numbers = exchange(messages, group, part, parts, sequence, total, equal, LANES)
            total, equal = sum_both(values, numbers, COMPILED)
        total += equal.to(DTYPE)
        upper = -row_min
        lower = eps * (tl.log(target) - log_of_sum(tl.where(total < 1, 1.0, total)) - 16 * accuracy) - row_max
        lower = tl.minimum(lower, upper)
        # rows that need no search: all of it is taken, or there is NaN in it or for its budget
        a = tl.where(target < all_valid, lower, tl.where(target == all_valid, upper, target))
        a = tl.where(row_max == row_max, a, row_max)
        active = ((target < all_valid) & (row_max == row_max)).to(tl.int32)
        passes = tl.full((), 0, tl.int32)
        while active > 0:
            high, low = split(-a, DTYPE)
            pivot = tl.full((), 0.0, DTYPE)
            total, num_clipped = _unclipped_sums(tile, high, low, pivot, scale, COMPILED)
            if not RESIDENT:
                wide = total.to(tl.float64)
                for block in tl.range(1, blocks):
                    streamed, _valid, _columns = row_tile(source, row, begin + block * BLOCK, n, BLOCK, HAS_MASK, DTYPE)
                    more, more_clipped = _unclipped_sums(streamed, high, low, pivot, scale, COMPILED)
                    wide += more.to(tl.float64)
                    num_clipped += more_clipped
                total = wide.to(DTYPE)
            if LANES > 1:
                sequence += 1
                values, numbers = exchange(messages, group, part, parts, sequence, total, num_clipped, LANES)
                total, num_clipped = sum_both(values, numbers, COMPILED)
            if total < _SMALLEST_MASS:
                pivot = _largest_below(tile, high, low)
                if not RESIDENT:
                    for block in tl.range(1, blocks):
                        streamed, _valid, _columns = row_tile(
                            source, row, begin + block * BLOCK, n, BLOCK, HAS_MASK, DTYPE
                        )
                        pivot = tl.maximum(pivot, _largest_below(streamed, high, low))
                if LANES > 1:
                    sequence += 1
                    values, numbers = exchange(messages, group, part, parts, sequence, pivot, num_valid, LANES)
                    pivot = tl.max(tl.where(there, values, float("-inf")))
                pivot = tl.where(pivot == float("-inf"), 0.0, pivot)
                total, _clipped = _unclipped_sums(tile, high, low, pivot, scale, COMPILED)
                if not RESIDENT:
                    wide = total.to(tl.float64)
                    for block in tl.range(1, blocks):
                        streamed, _valid, _columns = row_tile(
                            source, row, begin + block * BLOCK, n, BLOCK, HAS_MASK, DTYPE
                        )
                        more, _clipped = _unclipped_sums(streamed, high, low, pivot, scale, COMPILED)
                        wide += more.to(tl.float64)
                    total = wide.to(DTYPE)
                if LANES > 1:
                    sequence += 1
                    values, numbers = exchange(messages, group, part, parts, sequence, total, num_clipped, LANES)
                    total, _clipped = sum_both(values, numbers, COMPILED)
            # the sums were relative to high + pivot, the mass is to -a
            log_mass = tl.where(total > 0, log_of_sum(total), float("-inf")) + (pivot - low).to(tl.float64) / eps
            remainder = target - num_clipped.to(tl.float64)
            positive = tl.where(remainder > 0, remainder, 1.0)
            step = eps * (log_of_sum(positive.to(DTYPE)) - log_mass)
            newton_a = tl.where(remainder > 0, a + step, float("-inf"))
            upper = tl.where(newton_a < a, tl.minimum(upper, a), upper)
            lower = tl.minimum(tl.maximum(lower, newton_a - accuracy * tl.abs(newton_a - a)), upper)
            resolution = eps * accuracy + 4.440892098500626e-16 * tl.abs(a)
            done = (tl.abs(newton_a - a) <= resolution) | (upper - lower <= resolution)
            a = lower
            if (upper - lower > 4 * eps) & (passes % 2 == 0) & (done == 0):
                a = _midpoint(lower, upper, eps)
            passes += 1
            active = ((done == 0) & (passes < MAX_PASSES)).to(tl.int32)
        if part == 0:
            tl.store(roots + row, a)
        write_result(result, tile, valid, columns, row, n, a, scale, COMPILED)
        if not RESIDENT:
            for block in tl.range(1, blocks):
                streamed, streamed_valid, streamed_columns = row_tile(
                    source, row, begin + block * BLOCK, n, BLOCK, HAS_MASK, DTYPE
                )
                write_result(result, streamed, streamed_valid, streamed_columns, row, n, a, scale, COMPILED)


@triton.jit(do_not_specialize=["num_rows", "num_terms", "blocks", "eps"])
def _mean_gradient_kernel(
    scores,
    row_stride,
    column_stride,
    mask,
    mask_row_stride,
    mask_column_stride,
    grad,
    grad_row_stride,
    grad_column_stride,
    roots,
    terms,
    num_rows,
    n,
    num_terms,
    blocks,
    eps,
    BLOCK: tl.constexpr,
    HAS_MASK: tl.constexpr,
    DTYPE: tl.constexpr,
    COMPILED: tl.constexpr,
):
    """Of a part of a row's unclipped entries: the largest s + a (-inf if there is none), and relative to it the sums of
    y and of y * grad. terms: the three one after the other, (rows, num_terms) each."""
    source = (scores, row_stride, column_stride, mask, mask_row_stride, mask_column_stride)
    row = (tl.program_id(0) // num_terms).to(tl.int64)
    term = tl.program_id(0) % num_terms
    scale = per_octave(float64_of(eps), DTYPE)
    high, low = split(-tl.load(roots + row), DTYPE)
    largest = tl.full((), float("-inf"), DTYPE)
    for block in tl.range(0, blocks):
        tile, valid, columns = row_tile(source, row, (term * blocks + block) * BLOCK, n, BLOCK, HAS_MASK, DTYPE)
        largest = tl.maximum(largest, _largest_below(tile, high, low))
    pivot = tl.where(largest == float("-inf"), 0.0, largest)
    total = tl.full((), 0.0, tl.float64)
    weighted = tl.full((), 0.0, tl.float64)
    for block in tl.range(0, blocks):
        tile, valid, columns = row_tile(source, row, (term * blocks + block) * BLOCK, n, BLOCK, HAS_MASK, DTYPE)
        offset = tile - high
        free = valid & (offset < low)
        weights = tl.where(free, exp2((offset - pivot) * scale, COMPILED and tl.float32 == DTYPE), 0.0)
        upstream = gradient_tile(grad, grad_row_stride, grad_column_stride, row, columns, free, DTYPE)
        total += tl.sum(weights).to(tl.float64)
        # float64: where one entry has nearly all the mass, its own gradient less this mean cancels
        weighted += tl.sum(weights.to(tl.float64) * upstream.to(tl.float64))
    plane = num_rows.to(tl.int64) * num_terms
    place = terms + row * num_terms + term
    tl.store(place, (largest - low).to(tl.float64))
    tl.store(place + plane, total)
    tl.store(place + 2 * plane, weighted)


@triton.jit(do_not_specialize=["num_rows", "num_terms", "tiles", "eps"])
def _score_gradients_kernel(
    scores,
    row_stride,
    column_stride,
    mask,
    mask_row_stride,
    mask_column_stride,
    grad,
    grad_row_stride,
    grad_column_stride,
    roots,
    terms,
    grad_scores,
    grad_k,
    num_rows,
    n,
    num_terms,
    tiles,
    eps,
    TERMS: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_K: tl.constexpr,
    DTYPE: tl.constexpr,
    COMPILED: tl.constexpr,
):
    source = (scores, row_stride, column_stride, mask, mask_row_stride, mask_column_stride)
    row = (tl.program_id(0) // tiles).to(tl.int64)
    tile_number = tl.program_id(0) % tiles
    eps = float64_of(eps)
    tile, valid, columns = row_tile(source, row, tile_number * BLOCK, n, BLOCK, HAS_MASK, DTYPE)
    upstream = gradient_tile(grad, grad_row_stride, grad_column_stride, row, columns, valid, DTYPE)
    a = tl.load(roots + row)
    term = tl.arange(0, TERMS)
    place = terms + row * num_terms + term
    plane = num_rows.to(tl.int64) * num_terms
    largest = tl.load(place, mask=term < num_terms, other=float("-inf"))
    pivot = tl.max(largest)
    pivot = tl.where(pivot == float("-inf"), 0.0, pivot)
    share = tl.exp((largest - pivot) / eps)
    total = tl.sum(share * tl.load(place + plane, mask=term < num_terms, other=0.0))
    weighted = tl.sum(share * tl.load(place + 2 * plane, mask=term < num_terms, other=0.0))
    # 0 if no entry is unclipped, NaN in a spoiled row
    mean = tl.where(total > 0, weighted / tl.where(total > 0, total, 1.0), 0.0)
    mean = tl.where(a == a, mean, a)
    if HAS_K and tile_number == 0:
        tl.store(grad_k + row, mean)
    offset = difference(tile, -a)
    clipped = offset >= 0
    power = exp2(tl.where(clipped, 0.0, offset) * per_octave(eps, DTYPE), COMPILED and tl.float32 == DTYPE)
    gradient = power * (1.0 / eps).to(DTYPE) * difference(upstream, mean)
    gradient = tl.where(clipped, 0.0, tl.where(valid, gradient, 0.0))
    tl.store(grad_scores + row * n + columns, gradient.to(grad_scores.dtype.element_ty), mask=columns < n)


def _forward(scores: Tensor, k: Tensor | None, mask: Tensor | None, budget: float, eps: float) -> tuple[Tensor, Tensor]:
    """As that of `newton`."""
    n = scores.shape[-1]
    num_rows = scores.numel() // n
    layout = split_of(scores, num_rows)
    roots = torch.empty(scores.shape[:-1], dtype=torch.float64, device=scores.device)
    result = empty_result(scores)
    with torch.cuda.device_of(scores):
        _solve_kernel[(layout.parts * layout.groups,)](
            *row_arguments(scores, mask),
            roots if k is None else k.contiguous(),
            float64_bits(budget),
            roots,
            result,
            layout.messages(roots, 2),
            num_rows,
            n,
            layout.parts,
            layout.blocks,
            float64_bits(eps),
            float64_bits(newton.tolerance(arithmetic_dtype(scores))),
            MAX_PASSES=newton.MAX_PASSES,
            RESIDENT=layout.blocks == 1,
            **layout.launch,
            **constants(scores, k, mask),
        )
    return result, roots


def _backward(
    grad: Tensor, scores: Tensor, k: Tensor | None, mask: Tensor | None, a: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """As that of `newton`."""
    n = scores.shape[-1]
    num_rows = scores.numel() // n
    grad_scores = torch.empty(scores.shape, dtype=scores.dtype, device=scores.device)
    grad_k = empty_budget_gradient(k, scores)
    tiles = triton.cdiv(n, TILE_BLOCK)
    blocks = triton.cdiv(tiles, MOST_TERMS)
    num_terms = triton.cdiv(tiles, blocks)
    roots = a.contiguous()
    terms = roots.new_empty(3 * num_rows * num_terms)
    arguments = (*row_arguments(scores, mask), *as_rows(grad), roots, terms)
    compiled = constants(scores, k, mask)
    has_k = compiled.pop("HAS_K")
    eps_bits = float64_bits(eps)
    with torch.cuda.device_of(scores):
        _mean_gradient_kernel[(num_rows * num_terms,)](
            *arguments, num_rows, n, num_terms, blocks, eps_bits, BLOCK=TILE_BLOCK, **compiled
        )
        _score_gradients_kernel[(num_rows * tiles,)](
            *arguments,
            grad_scores,
            grad_k,
            num_rows,
            n,
            num_terms,
            tiles,
            eps_bits,
            TERMS=triton.next_power_of_2(num_terms),
            BLOCK=TILE_BLOCK,
            HAS_K=has_k,
            **compiled,
        )
    return grad_scores, grad_k


soft_topk_newton_triton_forward = define_newton("soft_topk_newton_triton", _forward, _backward)
