"""The exact soft top-k in Triton: `newton.solve`, each row until it has converged, laid out as `triton` lays rows out.

Backward: the mean gradient of the unclipped mass in parts, one program a tile; then the gradient to the scores.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
# (kernels: a type beside an argument would mean something else to Triton)

import torch
import triton
import triton.language as tl
from torch import Tensor

from colt5dist.ops.kernel_call import KernelCall, tensor_key
from colt5dist.ops.row_split import RowSplit, exchange, finish, first_sequence, messages, split_rows
from colt5dist.ops.soft_topk import newton
from colt5dist.ops.soft_topk.operator import arithmetic_dtype, define_newton, empty_result
from colt5dist.ops.soft_topk.triton import contiguous, row_constants, shared_device
from colt5dist.ops.soft_topk.triton_forward import (
    load_budget,
    store_budget_gradient,
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
    log_ratio,
    per_octave,
    row_arguments,
    row_tile,
    split,
)

TILE_BLOCK = 2048
"""Columns of a program of the backward."""
MOST_TERMS = 1024
"""Terms, at most, of which the backward's sums over a row consist."""
_SMALLEST_MASS = tl.constexpr(1e-30)
"""Unclipped mass below which it is taken relative to its largest term: it must not vanish."""


@triton.jit
def _extent(tile, valid):
    """Largest valid score (-inf if there is none, NaN if one is NaN) and number of valid ones."""
    spoiled = tl.sum((tile != tile).to(tl.int32))
    largest = tl.max(tl.where(tile == tile, tile, float("-inf")))
    return tl.where(spoiled > 0, float("nan"), largest), tl.sum(valid.to(tl.int32))


@triton.jit
def _largest_of(values, there):
    """The largest of those of a block's elements that are `there`, NaN if one is NaN."""
    spoiled = tl.sum((there & (values != values)).to(tl.int32))
    return tl.where(spoiled > 0, float("nan"), tl.max(tl.where(there, values, float("-inf"))))


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
    return sum_both(terms, clipped)


@triton.jit
def _largest_below(tile, high, low):
    """Largest s - high of the scores below high + low, -inf if there is none."""
    offset = tile - high
    return tl.max(tl.where(offset >= low, float("-inf"), offset))


@triton.jit(do_not_specialize=["num_rows", "parts", "blocks", "budget_bits", "stride", "eps", "accuracy"])
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
    stride,
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
    REPLICAS: tl.constexpr,
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
    nothing = tl.full((), 0, tl.int32)
    begin = part * blocks * BLOCK
    group = tl.program_id(0) // parts
    sequence = first_sequence(messages, stride, group, LANES)
    for task in tl.range(group, num_rows, tl.num_programs(0) // parts):
        row = tl.full((), 0, tl.int64) + task
        tile, valid, columns = row_tile(source, row, begin, n, BLOCK, HAS_MASK, DTYPE)
        largest, num_valid = _extent(tile, valid)
        smallest = tl.min(tl.where(valid, tile, float("inf")))
        if not RESIDENT:
            for block in tl.range(1, blocks):
                streamed, streamed_valid, _columns = row_tile(
                    source, row, begin + block * BLOCK, n, BLOCK, HAS_MASK, DTYPE
                )
                streamed_largest, streamed_number = _extent(streamed, streamed_valid)
                largest = larger(largest, streamed_largest)
                num_valid += streamed_number
                smallest = tl.minimum(smallest, tl.min(tl.where(streamed_valid, streamed, float("inf"))))
        if LANES > 1:
            sequence += 1
            values, numbers = exchange(
                messages, stride, group, part, parts, sequence, largest, num_valid, LANES, REPLICAS
            )
            largest = _largest_of(values, there)
            num_valid = tl.sum(numbers)
            sequence += 1
            values, numbers = exchange(
                messages, stride, group, part, parts, sequence, smallest, nothing, LANES, REPLICAS
            )
            smallest = tl.min(tl.where(there, values, float("inf")))
        row_max = tl.where(num_valid == 0, 0.0, largest).to(tl.float64)
        row_min = tl.where(num_valid == 0, 0.0, smallest).to(tl.float64)
        all_valid = num_valid.to(tl.float64)
        target = float64_of(budget_bits)
        if HAS_K:
            target = load_budget(k, row)
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
            values, numbers = exchange(
                messages, stride, group, part, parts, sequence, total, equal.to(tl.int32), LANES, REPLICAS
            )
            total, equal = sum_both(values, numbers)
        total += equal.to(DTYPE)
        upper = -row_min
        lower = (
            eps * (tl.log(target) - tl.log(tl.where(total < 1, 1.0, total).to(tl.float64)) - 16 * accuracy) - row_max
        )
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
                values, numbers = exchange(
                    messages, stride, group, part, parts, sequence, total, num_clipped.to(tl.int32), LANES, REPLICAS
                )
                total, num_clipped = sum_both(values, numbers)
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
                    values, numbers = exchange(
                        messages, stride, group, part, parts, sequence, pivot, nothing, LANES, REPLICAS
                    )
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
                    values, numbers = exchange(
                        messages, stride, group, part, parts, sequence, total, nothing, LANES, REPLICAS
                    )
                    total, _clipped = sum_both(values, numbers)
            # the sums were relative to high + pivot, the mass is to -a
            remainder = target - num_clipped.to(tl.float64)
            positive = tl.where(remainder > 0, remainder, 1.0).to(DTYPE)
            log_remainder = -log_ratio(0.0, 0.0, positive, COMPILED)
            log_ratio_of_masses = log_ratio(log_remainder, 0.0, tl.where(total > 0, total, 1.0), COMPILED).to(
                tl.float64
            )
            step = eps * log_ratio_of_masses - (pivot - low).to(tl.float64)
            step = tl.where(total > 0, step, float("inf"))
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
    finish(messages, stride, group, part, sequence, LANES)


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
    k,
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
        store_budget_gradient(grad_k, k, row, mean)
    offset = difference(tile, -a)
    clipped = offset >= 0
    power = exp2(tl.where(clipped, 0.0, offset) * per_octave(eps, DTYPE), COMPILED and tl.float32 == DTYPE)
    gradient = power * (1.0 / eps).to(DTYPE) * difference(upstream, mean)
    gradient = tl.where(clipped, 0.0, tl.where(valid, gradient, 0.0))
    tl.store(grad_scores + row * n + columns, gradient.to(grad_scores.dtype.element_ty), mask=columns < n)


_solve = KernelCall(_solve_kernel)
_means = KernelCall(_mean_gradient_kernel)
_gradients = KernelCall(_score_gradients_kernel)


def _forward(scores: Tensor, k: Tensor | None, mask: Tensor | None, budget: float, eps: float) -> tuple[Tensor, Tensor]:
    """As that of `newton`."""
    n = scores.shape[-1]
    num_rows = scores.numel() // n
    layout = split_rows(num_rows, n, shared_device(scores))
    k = contiguous(k)
    roots = torch.empty(scores.shape[:-1], dtype=torch.float64, device=scores.device)
    result = empty_result(scores)
    key = (
        layout,
        scores.device,
        tensor_key(scores),
        tensor_key(mask),
        None if k is None else (k.dtype, k.data_ptr() % 16 == 0),
    )
    with torch.cuda.device_of(scores):
        arguments = (
            *row_arguments(scores, mask),
            roots if k is None else k,
            float64_bits(budget),
            roots,
            result,
            *messages(layout, roots),
            num_rows,
            n,
            layout.parts,
            layout.blocks,
            float64_bits(eps),
            float64_bits(newton.tolerance(arithmetic_dtype(scores))),
        )
        constants = {"MAX_PASSES": newton.MAX_PASSES} | row_constants(scores, k, mask, layout)
        _solve(key, layout.parts * layout.groups, arguments, constants)
    return result, roots


def _backward(
    grad: Tensor,
    scores: Tensor,
    k: Tensor | None,
    mask: Tensor | None,
    a: Tensor,
    budget: float,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """As that of `newton`."""
    n = scores.shape[-1]
    num_rows = scores.numel() // n
    k, roots = contiguous(k), a.contiguous()
    grad_scores = torch.empty(scores.shape, dtype=scores.dtype, device=scores.device)
    tiles = -(-n // TILE_BLOCK)
    blocks = -(-tiles // MOST_TERMS)
    num_terms = -(-tiles // blocks)
    layout = RowSplit(1, TILE_BLOCK, blocks, num_rows, 4)
    terms = roots.new_empty(3 * num_rows * num_terms)
    grad_k = terms if k is None else roots.new_empty(k.shape)
    key = (
        layout,
        scores.device,
        tensor_key(scores),
        tensor_key(mask),
        tensor_key(grad),
        None if k is None else (k.dtype, k.data_ptr() % 16 == 0),
    )
    rows = (*row_arguments(scores, mask), *as_rows(grad), roots, terms)
    constants = row_constants(scores, k, mask, layout)
    del constants["LANES"], constants["REPLICAS"], constants["RESIDENT"]
    of_k = constants.pop("HAS_K")
    eps_bits = float64_bits(eps)
    with torch.cuda.device_of(scores):
        arguments = (*rows, num_rows, n, num_terms, blocks, eps_bits)
        _means(key, num_rows * num_terms, arguments, constants)
        arguments = (*rows, roots if k is None else k, grad_scores, grad_k, num_rows, n, num_terms, tiles, eps_bits)
        constants |= {"HAS_K": of_k, "TERMS": 1 << (num_terms - 1).bit_length()}
        _gradients(key, num_rows * tiles, arguments, constants)
    return grad_scores, terms.new_empty(0) if k is None else grad_k


soft_topk_newton_triton_forward = define_newton("soft_topk_newton_triton", _forward, _backward)
