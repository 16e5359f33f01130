"""Soft top-k with one scalar of state a row, in Triton. `colt5dist.ops.soft_topk` derives what is computed.

Forward, one kernel: a row's scores are read once and stay in registers, of one program or of several that exchange one
sum an iteration (`colt5dist.ops.row_split`); it runs the iterations, writes the states that are kept, and the result.
Backward, two kernels over tiles, none of which waits: the sum A_T in parts, and what else is the same for a whole row;
then the gradient to the scores. Where not all states were kept, the forward's kernel runs before them, a row a segment:
the same compiled code on the same values, so that the replayed states have the same bits.

Exponentials are powers of 2: exp((s - p) / eps) = 2 ** ((s - p) * log2(e) / eps). The float64 scalar p is split in two
float32; s - high > low decides on which side of p a score lies, exactly, and 2 ** (-low * scale) is a factor of the
whole sum.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
# (kernels: a type beside an argument would mean something else to Triton)

import math
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from colt5dist.ops.row_split import RowSplit, exchange, split_rows
from colt5dist.ops.soft_topk.operator import (
    SMALLEST_BUDGET,
    arithmetic_dtype,
    define_coordinate_descent,
    empty_budget_gradient,
    empty_result,
)
from colt5dist.ops.soft_topk.schedule import epsilon_schedule
from colt5dist.ops.triton_rows import (
    INTERPRETED,
    arithmetic_type,
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

TILE_BLOCK = 2048
"""Columns of a program that has a tile."""
MOST_TERMS = 1024
"""Terms, at most, of which the sum A_T of a row consists."""
_SMALLEST_BUDGET = tl.constexpr(SMALLEST_BUDGET)


@triton.jit
def load_budget(k, row, budget_bits, HAS_K: tl.constexpr):
    """The row's budget as float64; NaN is passed on."""
    if HAS_K:
        budget = tl.load(k + row).to(tl.float64)
        return tl.where(budget < _SMALLEST_BUDGET, _SMALLEST_BUDGET, budget)
    return float64_of(budget_bits)


@triton.jit
def _add_both(total, count, other_total, other_count):
    return total + other_total, count + other_count


@triton.jit
def sum_both(terms, counted, COMPILED: tl.constexpr):
    """Sum of `terms` and number of `counted`, in one reduction where that is possible."""
    if COMPILED:
        return tl.reduce((terms, counted.to(tl.int32)), 0, _add_both)
    return tl.sum(terms), tl.sum(counted.to(tl.int32))


@triton.jit
def _clipped_sums(tile, high, low, scale, COMPILED: tl.constexpr):
    """Sum of 2 ** ((s - high) * scale) over the scores up to high + low, and number of the others."""
    offset = tile - high
    clipped = offset > low
    terms = tl.where(clipped, 0.0, exp2(offset * scale, COMPILED and tile.dtype == tl.float32))
    return sum_both(terms, clipped, COMPILED)


@triton.jit
def extent(tile, valid):
    """Largest valid score (-inf if there is none, NaN if one is NaN) and number of valid ones."""
    spoiled = tl.sum((tile != tile).to(tl.int32))
    largest = tl.max(tl.where(tile == tile, tile, float("-inf")))
    return tl.where(spoiled > 0, float("nan"), largest), tl.sum(valid.to(tl.int32))


@triton.jit
def largest_of(values, there):
    """The largest of those of a block's elements that are `there`, NaN if one is NaN."""
    spoiled = tl.sum((there & (values != values)).to(tl.int32))
    return tl.where(spoiled > 0, float("nan"), tl.max(tl.where(there, values, float("-inf"))))


@triton.jit(
    do_not_specialize=[
        "num_rows",
        "parts",
        "blocks",
        "budget_bits",
        "n_iters",
        "segments",
        "kept",
        "first_eps",
        "decay",
        "last_eps",
        "with_result",
    ]
)
def _descend_kernel(
    scores,
    row_stride,
    column_stride,
    mask,
    mask_row_stride,
    mask_column_stride,
    k,
    budget_bits,
    segment_states,
    states,
    counts,
    result,
    messages,
    num_rows,
    n,
    parts,
    blocks,
    n_iters,
    segments,
    kept,
    first_eps,
    decay,
    last_eps,
    with_result,
    BLOCK: tl.constexpr,
    RESIDENT: tl.constexpr,
    LANES: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_K: tl.constexpr,
    DTYPE: tl.constexpr,
    COMPILED: tl.constexpr,
):
    """Run one of the `segments` segments of a row's iterations, from the state that ends the one before it.

    segment_states (rows, segments) holds those states and is not read for the first segment. Written are the states and
    counts (rows, kept) of the iterations that would end one of `kept` segments, and with_result the result.
    """
    source = (scores, row_stride, column_stride, mask, mask_row_stride, mask_column_stride)
    part = tl.program_id(0) % parts
    group = tl.program_id(0) // parts
    first_eps = float64_of(first_eps)
    decay = float64_of(decay)
    last_eps = float64_of(last_eps)
    sequence = 0
    for task in tl.range(group, num_rows * segments, tl.num_programs(0) // parts):
        row = (task // segments).to(tl.int64)
        segment = task % segments
        begin = part * blocks * BLOCK
        tile, valid, columns = row_tile(source, row, begin, n, BLOCK, HAS_MASK, DTYPE)
        largest, num_valid = extent(tile, valid)
        if not RESIDENT:
            for block in tl.range(1, blocks):
                streamed, streamed_valid, _columns = row_tile(
                    source, row, begin + block * BLOCK, n, BLOCK, HAS_MASK, DTYPE
                )
                streamed_largest, streamed_number = extent(streamed, streamed_valid)
                largest = larger(largest, streamed_largest)
                num_valid += streamed_number
        if LANES > 1:
            sequence += 1
            values, numbers = exchange(messages, group, part, parts, sequence, largest, num_valid, LANES)
            largest = largest_of(values, tl.arange(0, LANES) < parts)
            num_valid = tl.sum(numbers)
        row_max = tl.where(num_valid == 0, 0.0, largest).to(tl.float64)
        log_k = tl.log(load_budget(k, row, budget_bits, HAS_K))

        first = segment * n_iters // segments + 1
        last = (segment + 1) * n_iters // segments
        column = (first * kept + n_iters - 1) // n_iters - 1
        eps = first_eps
        a = row_max
        if segment == 0:
            a = eps * (log_k - tl.log(tl.where(num_valid < 1, 1, num_valid).to(tl.float64)))
            a = tl.where(row_max == row_max, a, row_max)
            if (column + 1) * n_iters // kept == 1:
                if part == 0:
                    tl.store(states + row * kept + column, a)
                    tl.store(counts + row * kept + column, tl.full((), 0, tl.int64))
                column += 1
            first += 1
        else:
            a = tl.load(segment_states + row * segments + segment - 1)
        for _iteration in tl.range(1, first):
            eps = tl.maximum(eps * decay, last_eps)
        for iteration in tl.range(first, last + 1):
            scale = per_octave(eps, DTYPE)
            pivot = tl.where(row_max > -a, -a, row_max)
            high, low = split(pivot, DTYPE)
            total, num_clipped = _clipped_sums(tile, high, low, scale, COMPILED)
            if not RESIDENT:
                wide_total = total.to(tl.float64)
                for block in tl.range(1, blocks):
                    streamed, _valid, _columns = row_tile(source, row, begin + block * BLOCK, n, BLOCK, HAS_MASK, DTYPE)
                    streamed_total, streamed_clipped = _clipped_sums(streamed, high, low, scale, COMPILED)
                    wide_total += streamed_total.to(tl.float64)
                    num_clipped += streamed_clipped
                total = wide_total.to(DTYPE)
            if LANES > 1:
                sequence += 1
                values, numbers = exchange(messages, group, part, parts, sequence, total, num_clipped, LANES)
                total, num_clipped = sum_both(values, numbers, COMPILED)
            total = total * tl.exp2(-low * scale) + num_clipped.to(DTYPE)
            # the largest term is exactly 1, so only a row without a valid entry is below that
            a = eps * (log_k - log_of_sum(tl.where(total < 1, 1.0, total))) - pivot
            if (column + 1) * n_iters // kept == iteration:
                if part == 0:
                    tl.store(states + row * kept + column, a)
                    tl.store(counts + row * kept + column, num_clipped.to(tl.int64))
                column += 1
            eps = tl.maximum(eps * decay, last_eps)

        if with_result != 0:
            scale = per_octave(eps, DTYPE)
            write_result(result, tile, valid, columns, row, n, a, scale, COMPILED)
            if not RESIDENT:
                for block in tl.range(1, blocks):
                    streamed, streamed_valid, streamed_columns = row_tile(
                        source, row, begin + block * BLOCK, n, BLOCK, HAS_MASK, DTYPE
                    )
                    write_result(result, streamed, streamed_valid, streamed_columns, row, n, a, scale, COMPILED)


@triton.jit
def write_result(result, tile, valid, columns, row, n, a, scale, COMPILED: tl.constexpr):
    """exp(min(s + a, 0) / eps), 0 where masked."""
    offset = difference(tile, -a)
    selected = exp2(tl.where(offset > 0, 0.0, offset) * scale, COMPILED and tile.dtype == tl.float32)
    tl.store(result + row * n + columns, tl.where(valid, selected, 0.0), mask=columns < n)


@triton.jit
def _temperatures(first_eps, log_decay, last_eps, iterations):
    """eps_t of `epsilon_schedule` at each of a block of iterations, in closed form, from the bits of its settings."""
    return tl.maximum(float64_of(first_eps) * tl.exp(float64_of(log_decay) * (iterations - 1)), float64_of(last_eps))


@triton.jit(
    do_not_specialize=["num_rows", "num_terms", "blocks", "budget_bits", "n_iters", "tail", "first_eps", "log_decay"]
)
def _row_gradients_kernel(
    scores,
    row_stride,
    column_stride,
    mask,
    mask_row_stride,
    mask_column_stride,
    grad,
    grad_row_stride,
    grad_column_stride,
    k,
    budget_bits,
    states,
    counts,
    terms,
    table,
    num_rows,
    n,
    num_terms,
    blocks,
    n_iters,
    tail,
    first_eps,
    log_decay,
    last_eps,
    result_eps,
    BLOCK: tl.constexpr,
    ITERATIONS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_K: tl.constexpr,
    DTYPE: tl.constexpr,
    COMPILED: tl.constexpr,
):
    """terms (rows, num_terms): the sum over a part of a row of d_i; its total is A_T.

    By the program of a row's first part also what its elements share, of type DTYPE: table (rows, n_iters, 4) with
    -a_t split in two, log2(e) / eps_t, and the factor of A_T that iteration t subtracts from an element's gradient,
    before its power of 2. From iteration `table[rows * n_iters * 4 + row]` on, that power is the one of iteration T:
    eps is the same, so the powers' ratios are row scalars. Behind `terms`, the factor of A_T that is dL/dk.
    """
    source = (scores, row_stride, column_stride, mask, mask_row_stride, mask_column_stride)
    row = (tl.program_id(0) // num_terms).to(tl.int64)
    term = tl.program_id(0) % num_terms
    a = tl.load(states + (row + 1) * n_iters - 1)
    high, low = split(-a, DTYPE)
    scale = per_octave(float64_of(result_eps), DTYPE)
    total = tl.full((), 0.0, tl.float64)
    for block in tl.range(0, blocks):
        tile, valid, columns = row_tile(source, row, (term * blocks + block) * BLOCK, n, BLOCK, HAS_MASK, DTYPE)
        upstream = gradient_tile(grad, grad_row_stride, grad_column_stride, row, columns, valid, DTYPE)
        direct = _direct_gradient(tile, upstream, valid, high, low, scale, COMPILED)
        total += tl.sum(direct).to(tl.float64)
    tl.store(terms + row * num_terms + term, total / float64_of(result_eps))

    if term == 0:
        budget = load_budget(k, row, budget_bits, HAS_K)
        step = tl.arange(0, ITERATIONS)
        within = step < n_iters
        a_t = tl.load(states + row * n_iters + step, mask=within, other=0.0)
        follows = step + 1 < n_iters
        a_next = tl.load(states + row * n_iters + step + 1, mask=follows, other=0.0)
        clipped_next = tl.load(counts + row * n_iters + step + 1, mask=follows, other=0).to(tl.float64)
        eps_t = _temperatures(first_eps, log_decay, last_eps, step + 1)
        eps_next = _temperatures(first_eps, log_decay, last_eps, step + 2)
        # clipped entries have a weight below 1 in all; where there are none, the exponential may overflow
        some = clipped_next > 0
        passed = clipped_next * tl.exp(tl.where(some, (a_next - a_t) / eps_next, 0.0)) / budget
        ratio = tl.cumprod(tl.where(follows, passed, 1.0), 0, reverse=True) / budget
        tl.store(terms + num_rows.to(tl.int64) * num_terms + row, tl.sum(tl.where(within, ratio * eps_t, 0.0)))

        octaves = per_octave(eps_t, tl.float64)
        # the power of 2 of iteration T stands for those of the last ones, unless it is too far from them
        apart = (a_t - a) * octaves
        too_far = within & ((step + 1 < tail) | (tl.abs(apart) > 40))
        tail_begin = tl.max(tl.where(too_far, step + 2, 1))
        in_tail = step + 1 >= tail_begin
        high_t = (-a_t).to(DTYPE)
        low_t = (-a_t - high_t.to(tl.float64)).to(DTYPE)
        scale_t = octaves.to(DTYPE)
        correction = tl.where(in_tail, apart - low.to(tl.float64) * octaves, -low_t.to(tl.float64) * octaves)
        factor = ratio * tl.exp2(correction)
        entry = table + (row * n_iters + step) * 4
        tl.store(entry, high_t, mask=within)
        tl.store(entry + 1, low_t, mask=within)
        tl.store(entry + 2, scale_t, mask=within)
        tl.store(entry + 3, factor.to(DTYPE), mask=within)
        tl.store(table + num_rows.to(tl.int64) * n_iters * 4 + row, tail_begin.to(DTYPE))


@triton.jit
def _direct_gradient(tile, upstream, valid, high, low, scale, COMPILED: tl.constexpr):
    """d_i * eps_{T+1}."""
    offset = tile - high
    clipped = offset > low
    power = exp2((tl.where(clipped, low, offset) - low) * scale, COMPILED and tile.dtype == tl.float32)
    return tl.where(clipped, 0.0, tl.where(valid, upstream * power, 0.0))


@triton.jit(do_not_specialize=["num_rows", "num_terms", "tiles", "n_iters", "result_eps"])
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
    terms,
    table,
    grad_scores,
    grad_k,
    num_rows,
    n,
    num_terms,
    tiles,
    n_iters,
    result_eps,
    TERMS: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_K: tl.constexpr,
    DTYPE: tl.constexpr,
    COMPILED: tl.constexpr,
):
    FLUSH: tl.constexpr = COMPILED and tl.float32 == DTYPE
    source = (scores, row_stride, column_stride, mask, mask_row_stride, mask_column_stride)
    row = (tl.program_id(0) // tiles).to(tl.int64)
    tile_number = tl.program_id(0) % tiles
    tile, valid, columns = row_tile(source, row, tile_number * BLOCK, n, BLOCK, HAS_MASK, DTYPE)
    upstream = gradient_tile(grad, grad_row_stride, grad_column_stride, row, columns, valid, DTYPE)
    term = tl.arange(0, TERMS)
    grad_a = tl.sum(tl.load(terms + row * num_terms + term, mask=term < num_terms, other=0.0))
    if HAS_K and tile_number == 0:
        tl.store(grad_k + row, grad_a * tl.load(terms + num_rows.to(tl.int64) * num_terms + row))

    last = table + (row * n_iters + n_iters - 1) * 4
    high = tl.load(last)
    scale = tl.load(last + 2)
    eps = float64_of(result_eps)
    gradient = _direct_gradient(tile, upstream, valid, high, tl.load(last + 1), per_octave(eps, DTYPE), COMPILED) * (
        1.0 / eps
    ).to(DTYPE)

    tail_begin = tl.load(table + num_rows.to(tl.int64) * n_iters * 4 + row).to(tl.int32)
    factors = tl.zeros([BLOCK], DTYPE)
    for passed in tl.range(0, n_iters + 1 - tl.where(tail_begin < 2, 2, tail_begin)):
        entry = last - passed * 4
        clipped = tile - tl.load(entry - 4) > tl.load(entry - 3)
        factors += tl.where(clipped, 0.0, tl.load(entry + 3))
    # an entry that is not clipped has a power below 2 ** 100; of others, infinity times 0 would be NaN
    exponent = (tile - high) * scale
    subtracted = factors * exp2(tl.where(exponent > 100, 100.0, exponent), FLUSH)
    for passed in tl.range(0, tail_begin - 2):
        entry = table + (row * n_iters + tail_begin - 2 - passed) * 4
        power = exp2((tile - tl.load(entry)) * tl.load(entry + 2), FLUSH)
        clipped = tile - tl.load(entry - 4) > tl.load(entry - 3)
        subtracted += tl.where(clipped, 0.0, tl.load(entry + 3) * power)
    gradient = tl.where(valid, gradient - grad_a.to(DTYPE) * subtracted, 0.0)
    tl.store(grad_scores + row * n + columns, gradient.to(grad_scores.dtype.element_ty), mask=columns < n)


def constants(scores: Tensor, k: Tensor | None, mask: Tensor | None) -> dict:
    """What every kernel is compiled for."""
    return {
        "HAS_MASK": mask is not None,
        "HAS_K": k is not None,
        "DTYPE": arithmetic_type(scores),
        "COMPILED": not INTERPRETED,
    }


def split_of(scores: Tensor, num_rows: int) -> RowSplit:
    """How `num_rows` rows like those of `scores` are split. Exchanged values are float32, so float64 rows are whole."""
    alone = not scores.is_cuda or scores.dtype == torch.float64
    return split_rows(num_rows, scores.shape[-1], None if alone else scores.device)


class _Schedule(NamedTuple):
    """Temperatures as the kernels take them: bits of float64. tail: the first iteration with the result's eps."""

    first: int
    decay: int
    log_decay: int
    last: int
    result: int
    tail: int


@lru_cache(maxsize=256)
def _schedule(eps: float, eps_init: float, eps_decay: float, n_iters: int) -> _Schedule:
    epsilons = epsilon_schedule(eps, eps_init, eps_decay, n_iters)
    bits = (epsilons[0], eps_decay, math.log(eps_decay), eps, epsilons[-1])
    return _Schedule(*(float64_bits(value) for value in bits), tail=1 + epsilons.index(epsilons[-1]))


def _descend(
    scores: Tensor,
    k: Tensor | None,
    mask: Tensor | None,
    budget: float,
    segment_states: Tensor | None,
    states: Tensor,
    counts: Tensor,
    result: Tensor | None,
    schedule: _Schedule,
    n_iters: int,
) -> None:
    """Launch the forward's kernel: for the result, or for all states from those at the ends of segments."""
    n = scores.shape[-1]
    num_rows = scores.numel() // n
    segments = 1 if segment_states is None else segment_states.shape[-1]
    layout = split_of(scores, num_rows)
    _descend_kernel[(layout.parts * min(layout.groups, num_rows * segments),)](
        *row_arguments(scores, mask),
        states if k is None else k,
        float64_bits(budget),
        states if segment_states is None else segment_states,
        states,
        counts,
        states if result is None else result,
        layout.messages(states, 2),
        num_rows,
        n,
        layout.parts,
        layout.blocks,
        n_iters,
        segments,
        states.shape[-1],
        schedule.first,
        schedule.decay,
        schedule.last,
        int(result is not None),
        RESIDENT=layout.blocks == 1,
        **layout.launch,
        **constants(scores, k, mask),
    )


def _forward(
    scores: Tensor,
    k: Tensor | None,
    mask: Tensor | None,
    budget: float,
    eps: float,
    eps_init: float,
    eps_decay: float,
    n_iters: int,
    segments: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """As that of `scalar_state`."""
    result = empty_result(scores)
    kept_a = torch.empty((*scores.shape[:-1], segments), dtype=torch.float64, device=scores.device)
    kept_clipped = torch.empty_like(kept_a, dtype=torch.int64)
    schedule = _schedule(eps, eps_init, eps_decay, n_iters)
    with torch.cuda.device_of(scores):
        _descend(scores, contiguous(k), mask, budget, None, kept_a, kept_clipped, result, schedule, n_iters)
    return result, kept_a, kept_clipped


def contiguous(k: Tensor | None) -> Tensor | None:
    """k as the kernels take it."""
    return None if k is None else k.contiguous()


def _backward(
    grad: Tensor,
    scores: Tensor,
    k: Tensor | None,
    mask: Tensor | None,
    kept_a: Tensor,
    kept_clipped: Tensor,
    budget: float,
    eps: float,
    eps_init: float,
    eps_decay: float,
    n_iters: int,
) -> tuple[Tensor, Tensor]:
    """As that of `scalar_state`."""
    n = scores.shape[-1]
    num_rows = scores.numel() // n
    segments = kept_a.shape[-1]
    schedule = _schedule(eps, eps_init, eps_decay, n_iters)
    k, states, counts = contiguous(k), kept_a.contiguous(), kept_clipped.contiguous()
    grad_scores = torch.empty(scores.shape, dtype=scores.dtype, device=scores.device)
    grad_k = empty_budget_gradient(k, scores)
    tiles = triton.cdiv(n, TILE_BLOCK)
    blocks = triton.cdiv(tiles, MOST_TERMS)
    num_terms = triton.cdiv(tiles, blocks)
    terms = states.new_empty(num_rows * (num_terms + 1))
    table = torch.empty(num_rows * (4 * n_iters + 1), dtype=arithmetic_dtype(scores), device=scores.device)
    arguments = (*row_arguments(scores, mask), *as_rows(grad))
    compiled = constants(scores, k, mask)
    with torch.cuda.device_of(scores):
        if segments < n_iters:
            kept = states
            states = kept.new_empty((num_rows, n_iters))
            counts = torch.empty_like(states, dtype=torch.int64)
            _descend(scores, k, mask, budget, kept, states, counts, None, schedule, n_iters)
        _row_gradients_kernel[(num_rows * num_terms,)](
            *arguments,
            states if k is None else k,
            float64_bits(budget),
            states,
            counts,
            terms,
            table,
            num_rows,
            n,
            num_terms,
            blocks,
            n_iters,
            schedule.tail,
            schedule.first,
            schedule.log_decay,
            schedule.last,
            schedule.result,
            BLOCK=TILE_BLOCK,
            ITERATIONS=triton.next_power_of_2(n_iters),
            **compiled,
        )
        _score_gradients_kernel[(num_rows * tiles,)](
            *arguments,
            terms,
            table,
            grad_scores,
            grad_k,
            num_rows,
            n,
            num_terms,
            tiles,
            n_iters,
            schedule.result,
            TERMS=triton.next_power_of_2(num_terms),
            BLOCK=TILE_BLOCK,
            **compiled,
        )
    return grad_scores, grad_k


soft_topk_triton_forward = define_coordinate_descent("soft_topk_triton", _forward, _backward)
