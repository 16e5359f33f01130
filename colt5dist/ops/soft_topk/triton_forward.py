"""The forward's kernel of soft top-k by coordinate descent, which is also the backward's replay.

A row's scores are read once and stay in registers, of one program or of several that exchange one sum an iteration
(`colt5dist.ops.row_split`). What is serial, the arithmetic of the row's scalars between two sums, decides the speed:
exponentials are powers of 2, a scalar of 48 bits is the sum of two float32 (float64 is slower by several times), and
its low part is a factor of a whole sum: 2 ** ((s - high - low) * scale).
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
# (kernels: a type beside an argument would mean something else to Triton)

import triton
import triton.language as tl

from colt5dist.ops.row_split import exchange, finish, first_sequence
from colt5dist.ops.soft_topk.operator import SMALLEST_BUDGET
from colt5dist.ops.triton_rows import (
    difference,
    exp2,
    float64_of,
    log_ratio,
    per_octave,
    renormalised,
    row_tile,
    split,
    times,
    two_sum,
)

_SMALLEST_BUDGET = tl.constexpr(SMALLEST_BUDGET)


@triton.jit
def load_budget(k, row):
    """A row's budget as float64; NaN is passed on."""
    budget = tl.load(k + row).to(tl.float64)
    return tl.where(budget < _SMALLEST_BUDGET, _SMALLEST_BUDGET, budget)


@triton.jit
def store_budget_gradient(grad_k, k, row, gradient):
    """The gradient to a budget: 0 where `load_budget` raised it."""
    tl.store(grad_k + row, tl.where(tl.load(k + row).to(tl.float64) < _SMALLEST_BUDGET, 0.0, gradient))


@triton.jit
def sum_both(terms, counted):
    """Sum of `terms` and number of `counted`, in one reduction; the number has the type of the terms."""
    return tl.split(tl.sum(tl.join(terms, counted.to(terms.dtype)), axis=0))


@triton.jit
def _clipped_sums(tile, high, low, scale, COMPILED: tl.constexpr):
    """Sum of 2 ** ((s - high) * scale) over the scores up to high + low, and number of the others."""
    offset = tile - high
    clipped = offset > low
    return sum_both(tl.where(clipped, 0.0, exp2(offset * scale, COMPILED and tl.float32 == tile.dtype)), clipped)


@triton.jit
def _row_sums(
    tile,
    source,
    row,
    begin,
    n,
    blocks,
    messages,
    stride,
    group,
    part,
    parts,
    sequence,
    high,
    low,
    scale,
    BLOCK: tl.constexpr,
    RESIDENT: tl.constexpr,
    LANES: tl.constexpr,
    REPLICAS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    DTYPE: tl.constexpr,
    COMPILED: tl.constexpr,
):
    """`_clipped_sums` of the whole row, and the number of the last exchange; the sum is relative to high + low."""
    total, num_clipped = _clipped_sums(tile, high, low, scale, COMPILED)
    if not RESIDENT:
        wide_total = total.to(tl.float64)
        wide_clipped = num_clipped.to(tl.float64)
        for block in tl.range(1, blocks):
            streamed, _valid, _columns = row_tile(source, row, begin + block * BLOCK, n, BLOCK, HAS_MASK, DTYPE)
            more, more_clipped = _clipped_sums(streamed, high, low, scale, COMPILED)
            wide_total += more.to(tl.float64)
            wide_clipped += more_clipped.to(tl.float64)
        total = wide_total.to(DTYPE)
        num_clipped = wide_clipped.to(DTYPE)
    if LANES > 1:
        sequence += 1
        values, numbers = exchange(
            messages, stride, group, part, parts, sequence, total, num_clipped.to(tl.int32), LANES, REPLICAS
        )
        total, num_clipped = sum_both(values, numbers)
    return total * exp2(-low * scale, COMPILED and tl.float32 == DTYPE) + num_clipped, num_clipped, sequence


@triton.jit
def _row_max(
    tile,
    source,
    row,
    begin,
    n,
    blocks,
    messages,
    stride,
    group,
    part,
    parts,
    sequence,
    BLOCK: tl.constexpr,
    RESIDENT: tl.constexpr,
    LANES: tl.constexpr,
    REPLICAS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Largest valid score of a row without NaN, -inf if there is none, and the number of the last exchange."""
    largest = tl.max(tile)
    if not RESIDENT:
        for block in tl.range(1, blocks):
            streamed, _valid, _columns = row_tile(source, row, begin + block * BLOCK, n, BLOCK, HAS_MASK, DTYPE)
            largest = tl.maximum(largest, tl.max(streamed))
    if LANES > 1:
        sequence += 1
        values, _numbers = exchange(
            messages, stride, group, part, parts, sequence, largest, tl.full((), 0, tl.int32), LANES, REPLICAS
        )
        largest = tl.max(tl.where(tl.arange(0, LANES) < parts, values, float("-inf")))
    return largest, sequence


@triton.jit
def _row_count(
    counted,
    source,
    row,
    begin,
    n,
    blocks,
    messages,
    stride,
    group,
    part,
    parts,
    sequence,
    NAN: tl.constexpr,
    BLOCK: tl.constexpr,
    RESIDENT: tl.constexpr,
    LANES: tl.constexpr,
    REPLICAS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Number of a row's valid scores, or of those that are NaN, and the number of the last exchange. counted: which are
    such in the program's first block."""
    number = tl.sum(counted.to(tl.int32))
    if not RESIDENT:
        for block in tl.range(1, blocks):
            streamed, valid, _columns = row_tile(source, row, begin + block * BLOCK, n, BLOCK, HAS_MASK, DTYPE)
            if NAN:
                valid = streamed != streamed
            number += tl.sum(valid.to(tl.int32))
    if LANES > 1:
        sequence += 1
        _values, numbers = exchange(
            messages, stride, group, part, parts, sequence, tl.full((), 0.0, tl.float32), number, LANES, REPLICAS
        )
        number = tl.sum(numbers)
    return number, sequence


@triton.jit
def store_state(place, a_high, a_low, num_clipped):
    """Keep a and the number of clipped entries, both float64."""
    tl.store(place, a_high.to(tl.float64) + a_low.to(tl.float64))
    tl.store(place + 1, num_clipped.to(tl.float64))


@triton.jit
def write_result(result, tile, valid, columns, row, n, a, scale, COMPILED: tl.constexpr):
    """exp(min(s + a, 0) / eps), 0 where masked."""
    offset = difference(tile, -a)
    selected = exp2(tl.where(offset > 0, 0.0, offset) * scale, COMPILED and tile.dtype == tl.float32)
    tl.store(result + row * n + columns, tl.where(valid, selected, 0.0), mask=columns < n)


@triton.jit(
    do_not_specialize=[
        "num_rows",
        "parts",
        "blocks",
        "log_budget",
        "log_n",
        "stride",
        "n_iters",
        "segments",
        "kept",
        "tail",
        "first_eps",
        "decay",
        "last_eps",
        "with_result",
    ]
)
def descend_kernel(
    scores,
    row_stride,
    column_stride,
    mask,
    mask_row_stride,
    mask_column_stride,
    k,
    log_budget,
    log_n,
    segment_states,
    states,
    result,
    messages,
    stride,
    num_rows,
    n,
    parts,
    blocks,
    n_iters,
    segments,
    kept,
    tail,
    first_eps,
    decay,
    last_eps,
    with_result,
    BLOCK: tl.constexpr,
    RESIDENT: tl.constexpr,
    LANES: tl.constexpr,
    REPLICAS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_K: tl.constexpr,
    DTYPE: tl.constexpr,
    COMPILED: tl.constexpr,
):
    """Run one of the `segments` segments of a row's iterations, from the state that ends the one before it.

    segment_states (rows, segments, 2) holds those states and is not read for the first segment. Written are the states
    (rows, kept, 2), a and the count of clipped entries, of the iterations that would end one of `kept` segments, and
    with_result the result. From iteration `tail` on the temperature is last_eps.
    """
    source = (scores, row_stride, column_stride, mask, mask_row_stride, mask_column_stride)
    part = tl.program_id(0) % parts
    group = tl.program_id(0) // parts
    sequence = first_sequence(messages, stride, group, LANES)
    first_high, first_low = split(float64_of(first_eps), DTYPE)
    decay_high, decay_low = split(float64_of(decay), DTYPE)
    last_high, last_low = split(float64_of(last_eps), DTYPE)
    for task in tl.range(group, num_rows * segments, tl.num_programs(0) // parts):
        row = (task // segments).to(tl.int64)
        segment = task % segments
        begin = part * blocks * BLOCK
        tile, valid, columns = row_tile(source, row, begin, n, BLOCK, HAS_MASK, DTYPE)
        log_k = float64_of(log_budget)
        if HAS_K:
            log_k = tl.log(load_budget(k, row))
        log_high, log_low = split(log_k, DTYPE)

        first = segment * n_iters // segments + 1
        last = (segment + 1) * n_iters // segments
        column = (first * kept + n_iters - 1) // n_iters - 1
        a = tl.full((), 0.0, tl.float64)
        if segment == 0:
            log_valid = float64_of(log_n)
            if HAS_MASK:
                num_valid, sequence = _row_count(
                    valid, source, row, begin, n, blocks, messages, stride, group, part, parts, sequence,
                    False, BLOCK, RESIDENT, LANES, REPLICAS, HAS_MASK, DTYPE,
                )  # fmt: skip
                log_valid = tl.log(tl.where(num_valid < 1, 1, num_valid).to(tl.float64))
            a = float64_of(first_eps) * (log_k - log_valid)
            if n_iters == 1:  # the only iteration that does not look at the scores
                spoiled, sequence = _row_count(
                    tile != tile, source, row, begin, n, blocks, messages, stride, group, part, parts, sequence,
                    True, BLOCK, RESIDENT, LANES, REPLICAS, HAS_MASK, DTYPE,
                )  # fmt: skip
                a = tl.where(spoiled > 0, float("nan"), a)
        else:
            a = tl.load(segment_states + (row * segments + segment - 1) * 2)
        a_high, a_low = split(a, DTYPE)
        a_high, a_low = renormalised(a_high, a_low)
        if segment == 0:
            if (column + 1) * n_iters < 2 * kept:
                if part == 0:
                    store_state(states + (row * kept + column) * 2, a_high, a_low, tl.zeros_like(a_high))
                column += 1
            first += 1
        eps_high, eps_low = first_high, first_low
        for iteration in tl.range(2, first + 1):
            eps_high, eps_low = times(eps_high, eps_low, decay_high, decay_low)
            eps_high = tl.where(iteration < tail, eps_high, last_high)
            eps_low = tl.where(iteration < tail, eps_low, last_low)
        for iteration in tl.range(first, last + 1):
            scale = per_octave(eps_high, DTYPE)
            high, low = -a_high, -a_low
            total, num_clipped, sequence = _row_sums(
                tile, source, row, begin, n, blocks, messages, stride, group, part, parts, sequence, high, low, scale,
                BLOCK, RESIDENT, LANES, REPLICAS, HAS_MASK, DTYPE, COMPILED,
            )  # fmt: skip
            if total < 0.015625:
                # all scores are far below -a, and their terms too small: they are taken relative to the largest
                largest, sequence = _row_max(
                    tile, source, row, begin, n, blocks, messages, stride, group, part, parts, sequence,
                    BLOCK, RESIDENT, LANES, REPLICAS, HAS_MASK, DTYPE,
                )  # fmt: skip
                high = tl.where(largest == float("-inf"), 0.0, largest)
                low = tl.zeros_like(low)
                total, num_clipped, sequence = _row_sums(
                    tile, source, row, begin, n, blocks, messages, stride, group, part, parts, sequence, high, low,
                    scale, BLOCK, RESIDENT, LANES, REPLICAS, HAS_MASK, DTYPE, COMPILED,
                )  # fmt: skip
                total = tl.where(total < 1, 1.0, total)  # a row without a valid entry
            change = log_ratio(log_high, log_low, total, COMPILED)
            change = eps_high * change + eps_low * change
            a_high, a_low = two_sum(-high, change)
            a_high, a_low = renormalised(a_high, a_low - low)
            if (column + 1) * n_iters < (iteration + 1) * kept:
                if part == 0:
                    store_state(states + (row * kept + column) * 2, a_high, a_low, num_clipped)
                column += 1
            eps_high, eps_low = times(eps_high, eps_low, decay_high, decay_low)
            eps_high = tl.where(iteration + 1 < tail, eps_high, last_high)
            eps_low = tl.where(iteration + 1 < tail, eps_low, last_low)

        if with_result != 0:
            scale = per_octave(eps_high, DTYPE)
            a = a_high.to(tl.float64) + a_low.to(tl.float64)
            write_result(result, tile, valid, columns, row, n, a, scale, COMPILED)
            if not RESIDENT:
                for block in tl.range(1, blocks):
                    streamed, streamed_valid, streamed_columns = row_tile(
                        source, row, begin + block * BLOCK, n, BLOCK, HAS_MASK, DTYPE
                    )
                    write_result(result, streamed, streamed_valid, streamed_columns, row, n, a, scale, COMPILED)
    finish(messages, stride, group, part, sequence, LANES)
