"""The backward's kernel of soft top-k by coordinate descent: elementwise but for one sum over the row.

Each program adds up its part of A_T and gives it to the row's others; while their parts are on the way it computes what
its elements share, the factors of A_T in which iterations enter a gradient. Then every element's gradient is a sum over
the iterations. From the iteration on at which the temperature stays constant, all powers of 2 are one power times a
row scalar: they cost a comparison and an addition each.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
# (kernels: a type beside an argument would mean something else to Triton)

import triton
import triton.language as tl

from colt5dist.ops.row_split import collect, finish, first_sequence, post
from colt5dist.ops.soft_topk.triton_forward import load_budget, store_budget_gradient
from colt5dist.ops.triton_rows import exp2, float64_of, gradient_tile, per_octave, row_tile, split


@triton.jit
def _direct_gradient(tile, upstream, valid, high, low, scale, COMPILED: tl.constexpr):
    """d_i * eps_{T+1}."""
    offset = tile - high
    clipped = offset > low
    power = exp2((tl.where(clipped, low, offset) - low) * scale, COMPILED and tile.dtype == tl.float32)
    return tl.where(clipped, 0.0, tl.where(valid, upstream * power, 0.0))


@triton.jit
def _subtracted(tile, table, n_iters, begin, tail_begin, FLUSH: tl.constexpr):
    """What A_T is multiplied by before it is subtracted from d_i: the sum over the iterations begin .. n_iters."""
    last = table + (n_iters - 1) * 4
    factors = tl.zeros_like(tile)
    for passed in tl.range(0, n_iters + 1 - tl.maximum(tail_begin, begin), loop_unroll_factor=4):
        entry = last - passed * 4
        clipped = tile - tl.load(entry - 4) > tl.load(entry - 3)
        factors += tl.where(clipped, 0.0, tl.load(entry + 3))
    # an entry that is not clipped has a power below 2 ** 100; of others, infinity times 0 would be NaN
    exponent = (tile - tl.load(last)) * tl.load(last + 2)
    subtracted = factors * exp2(tl.where(exponent > 100, 100.0, exponent), FLUSH)
    for passed in tl.range(0, tail_begin - begin, loop_unroll_factor=4):
        entry = table + (tail_begin - 2 - passed) * 4
        power = exp2((tile - tl.load(entry)) * tl.load(entry + 2), FLUSH)
        clipped = tile - tl.load(entry - 4) > tl.load(entry - 3)
        subtracted += tl.where(clipped, 0.0, tl.load(entry + 3) * power)
    return subtracted


@triton.jit
def _store_table(
    table,
    states,
    row,
    budget,
    first_eps,
    log_decay,
    decay,
    last_eps,
    n_iters,
    tail,
    ITERATIONS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Write table (n_iters, 4) of type DTYPE: of iteration t, -a_t split in two, log2(e) / eps_t, and the factor of A_T
    that it subtracts from an element's gradient, before its power of 2.

    Returns the first iteration with such a factor (2 or more), the one from which on that power is the one of the last
    iteration, and the factor of A_T that is dL/dk.
    """
    step = tl.arange(0, ITERATIONS)
    within = step < n_iters
    follows = step + 1 < n_iters
    a_last = tl.load(states + ((row + 1) * n_iters - 1) * 2)
    a_t = tl.load(states + (row * n_iters + step) * 2, mask=within, other=0.0)
    a_next = tl.load(states + (row * n_iters + step) * 2 + 2, mask=follows, other=0.0)
    clipped_next = tl.load(states + (row * n_iters + step) * 2 + 3, mask=follows, other=0.0).to(DTYPE)
    eps_t = tl.maximum(first_eps * tl.exp(log_decay * step), last_eps)
    eps_next = tl.maximum(eps_t * decay, last_eps)
    scale = per_octave(eps_t, DTYPE)
    # clipped entries have a weight below 1 in all; where there are none, the exponential may overflow
    growth = tl.where(clipped_next > 0, (a_next - a_t).to(DTYPE) * per_octave(eps_next, DTYPE), 0.0)
    passed = clipped_next * tl.exp2(growth) / budget.to(DTYPE)
    ratio = tl.cumprod(tl.where(follows, passed, 1.0), 0, reverse=True) / budget.to(DTYPE)
    # the power of 2 of the last iteration stands for those before it, unless it is too far from them
    apart = (a_t - a_last).to(DTYPE) * scale
    too_far = within & ((step + 1 < tail) | (tl.abs(apart) > 40))
    tail_begin = tl.max(tl.where(too_far, step + 2, 1))
    high, low = split(-a_t, DTYPE)
    _high, low_last = split(-a_last, DTYPE)
    correction = tl.where(step + 1 >= tail_begin, apart - low_last * scale, -low * scale)
    entry = table + step * 4
    tl.store(entry, high, mask=within)
    tl.store(entry + 1, low, mask=within)
    tl.store(entry + 2, scale, mask=within)
    tl.store(entry + 3, ratio * tl.exp2(correction), mask=within)
    # an iteration that clips nothing passes nothing on to those before it
    begin = tl.maximum(tl.min(tl.where(ratio != 0, step + 1, n_iters)), 2)
    return begin, tail_begin, tl.sum(tl.where(within, ratio.to(tl.float64) * eps_t, 0.0))


@triton.jit(
    do_not_specialize=[
        "num_rows",
        "parts",
        "blocks",
        "budget_bits",
        "stride",
        "n_iters",
        "tail",
        "first_eps",
        "log_decay",
        "decay",
        "last_eps",
    ]
)
def gradient_kernel(
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
    tables,
    grad_scores,
    grad_k,
    messages,
    stride,
    num_rows,
    n,
    parts,
    blocks,
    n_iters,
    tail,
    first_eps,
    log_decay,
    decay,
    last_eps,
    BLOCK: tl.constexpr,
    RESIDENT: tl.constexpr,
    LANES: tl.constexpr,
    REPLICAS: tl.constexpr,
    ITERATIONS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_K: tl.constexpr,
    DTYPE: tl.constexpr,
    COMPILED: tl.constexpr,
):
    """Gradients to the scores and, HAS_K, to the budgets, from all states (rows, n_iters, 2). tables: room for
    4 * n_iters numbers of type DTYPE a program. From iteration `tail` on the temperature is last_eps."""
    FLUSH: tl.constexpr = COMPILED and tl.float32 == DTYPE
    source = (scores, row_stride, column_stride, mask, mask_row_stride, mask_column_stride)
    part = tl.program_id(0) % parts
    group = tl.program_id(0) // parts
    sequence = first_sequence(messages, stride, group, LANES)
    table = tables + tl.program_id(0).to(tl.int64) * n_iters * 4
    eps = float64_of(last_eps)
    scale = per_octave(eps, DTYPE)
    inverse_eps = (1.0 / eps).to(DTYPE)
    for task in tl.range(group, num_rows, tl.num_programs(0) // parts):
        row = tl.full((), 0, tl.int64) + task
        begin = part * blocks * BLOCK
        tile, valid, columns = row_tile(source, row, begin, n, BLOCK, HAS_MASK, DTYPE)
        upstream = gradient_tile(grad, grad_row_stride, grad_column_stride, row, columns, valid, DTYPE)
        high, low = split(-tl.load(states + ((row + 1) * n_iters - 1) * 2), DTYPE)
        direct = _direct_gradient(tile, upstream, valid, high, low, scale, COMPILED)
        total = tl.sum(direct).to(tl.float64)
        if not RESIDENT:
            for block in tl.range(1, blocks):
                streamed, streamed_valid, streamed_columns = row_tile(
                    source, row, begin + block * BLOCK, n, BLOCK, HAS_MASK, DTYPE
                )
                more = gradient_tile(
                    grad, grad_row_stride, grad_column_stride, row, streamed_columns, streamed_valid, DTYPE
                )
                total += tl.sum(_direct_gradient(streamed, more, streamed_valid, high, low, scale, COMPILED)).to(
                    tl.float64
                )
        if LANES > 1:
            sequence += 1
            post(
                messages, stride, group, part, sequence, total.to(tl.float32), tl.full((), 0, tl.int32), LANES, REPLICAS
            )
        budget = float64_of(budget_bits)
        if HAS_K:
            budget = load_budget(k, row)
        first_needed, tail_begin, of_budget = _store_table(
            table,
            states,
            row,
            budget,
            float64_of(first_eps),
            float64_of(log_decay),
            float64_of(decay),
            eps,
            n_iters,
            tail,
            ITERATIONS,
            DTYPE,
        )
        tl.debug_barrier()  # the table is read by other threads than those that wrote it
        # while the other parts of A_T are on the way
        subtracted = _subtracted(tile, table, n_iters, first_needed, tail_begin, FLUSH)
        if LANES > 1:
            values, _counts = collect(messages, stride, group, part, parts, sequence, LANES, REPLICAS)
            total = tl.sum(values.to(tl.float64))
        grad_a = total / eps
        if HAS_K and part == 0:
            store_budget_gradient(grad_k, k, row, grad_a * of_budget)
        share = grad_a.to(DTYPE)
        gradient = direct * inverse_eps - share * subtracted
        gradient = tl.where(valid, gradient, 0.0)
        tl.store(grad_scores + row * n + columns, gradient.to(grad_scores.dtype.element_ty), mask=columns < n)
        if not RESIDENT:
            for block in tl.range(1, blocks):
                streamed, streamed_valid, streamed_columns = row_tile(
                    source, row, begin + block * BLOCK, n, BLOCK, HAS_MASK, DTYPE
                )
                more = gradient_tile(
                    grad, grad_row_stride, grad_column_stride, row, streamed_columns, streamed_valid, DTYPE
                )
                gradient = _direct_gradient(streamed, more, streamed_valid, high, low, scale, COMPILED) * inverse_eps
                gradient -= share * _subtracted(streamed, table, n_iters, first_needed, tail_begin, FLUSH)
                gradient = tl.where(streamed_valid, gradient, 0.0)
                tl.store(
                    grad_scores + row * n + streamed_columns,
                    gradient.to(grad_scores.dtype.element_ty),
                    mask=streamed_columns < n,
                )
        tl.debug_barrier()  # before the next row's table is written
    finish(messages, stride, group, part, sequence, LANES)
