"""Attention of one new token in Triton: rotation, cache and attention in one kernel; a long context in parallel parts.

A program that has read scores s_j with values v_j keeps m = max s_j, l = sum exp(s_j - m) and a = sum exp(s_j - m) v_j.
Parts i of a context then join to sum_i exp(m_i - M) a_i / sum_i exp(m_i - M) l_i with M = max m_i. An empty part has
m = -inf, l = 0, a = 0. All sums are float32, in an order that depends on the shapes only.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
# (kernels: a type beside an argument would mean something else to Triton)

import torch
import triton
import triton.language as tl
from torch import Tensor

PAST_BLOCK = 64
"""Decoded tokens that a program reads at a time."""
CONTEXT_BLOCK = 64
"""Keys of a context that a program reads at a time."""
MOST_QUERIES = 64
"""Queries of one program; more are several programs, which read the context again."""
PROGRAMS = 512
"""Programs that a context is cut into: about four for each multiprocessor of a large GPU."""
MOST_PARTS = 128


@triton.jit
def _past_kernel(
    qkv, keys, values, source, cosine, sine, position, out, scale, slots,
    HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    now = tl.load(position)
    column = tl.arange(0, BLOCK_HALF)
    inside = column < HALF
    dtype = keys.dtype.element_ty
    cos = tl.load(cosine + now * HALF + column, mask=inside, other=0.0).to(tl.float32)
    sin = tl.load(sine + now * HALF + column, mask=inside, other=0.0).to(tl.float32)
    width = HEADS * 2 * HALF
    start = qkv + row * 3 * width + head * 2 * HALF + column
    q1 = tl.load(start, mask=inside, other=0.0).to(tl.float32)
    q2 = tl.load(start + HALF, mask=inside, other=0.0).to(tl.float32)
    k1 = tl.load(start + width, mask=inside, other=0.0).to(tl.float32)
    k2 = tl.load(start + width + HALF, mask=inside, other=0.0).to(tl.float32)
    v1 = tl.load(start + 2 * width, mask=inside, other=0.0)
    v2 = tl.load(start + 2 * width + HALF, mask=inside, other=0.0)
    # rounded as they are kept, so that this step sees what later steps will see
    own1 = (k1 * cos - k2 * sin).to(dtype)
    own2 = (k2 * cos + k1 * sin).to(dtype)
    turned1 = (q1 * cos - q2 * sin).to(dtype).to(tl.float32) * scale
    turned2 = (q2 * cos + q1 * sin).to(dtype).to(tl.float32) * scale
    place = (row * slots + now) * width + head * 2 * HALF + column
    tl.store(keys + place, own1, mask=inside)
    tl.store(keys + place + HALF, own2, mask=inside)
    tl.store(values + place, v1, mask=inside)
    tl.store(values + place + HALF, v2, mask=inside)

    largest = tl.sum(own1.to(tl.float32) * turned1 + own2.to(tl.float32) * turned2, axis=0)
    total = tl.exp(largest - largest)
    sum1 = v1.to(tl.float32)
    sum2 = v2.to(tl.float32)
    for first in range(0, now.to(tl.int32), BLOCK):
        slot = first + tl.arange(0, BLOCK)
        seen = slot < now
        origin = tl.load(source + row * slots + slot, mask=seen, other=0)
        places = ((origin * slots + slot) * width + head * 2 * HALF)[:, None] + column[None, :]
        there = seen[:, None] & inside[None, :]
        past1 = tl.load(keys + places, mask=there, other=0.0).to(tl.float32)
        past2 = tl.load(keys + places + HALF, mask=there, other=0.0).to(tl.float32)
        scores = tl.sum(past1 * turned1[None, :] + past2 * turned2[None, :], axis=1)
        scores = tl.where(seen, scores, float("-inf"))
        larger = tl.maximum(largest, tl.max(scores, axis=0))
        shrink = tl.exp(largest - larger)
        weights = tl.exp(scores - larger)
        past1 = tl.load(values + places, mask=there, other=0.0).to(tl.float32)
        past2 = tl.load(values + places + HALF, mask=there, other=0.0).to(tl.float32)
        total = total * shrink + tl.sum(weights, axis=0)
        sum1 = sum1 * shrink + tl.sum(past1 * weights[:, None], axis=0)
        sum2 = sum2 * shrink + tl.sum(past2 * weights[:, None], axis=0)
        largest = larger
    target = out + row * width + head * 2 * HALF + column
    tl.store(target, (sum1 / total).to(dtype), mask=inside)
    tl.store(target + HALF, (sum2 / total).to(dtype), mask=inside)


def attend_to_past_triton(
    qkv: Tensor, keys: Tensor, values: Tensor, source: Tensor, cosine: Tensor, sine: Tensor, position: Tensor
) -> Tensor:
    """As `attend_to_past`."""
    rows, slots, heads, dim = keys.shape
    out = torch.empty(rows, heads * dim, dtype=qkv.dtype, device=qkv.device)
    arguments = (qkv.contiguous(), keys, values, source.contiguous(), cosine.contiguous(), sine.contiguous(), position)
    half = dim // 2
    _past_kernel[(rows, heads)](
        *arguments, out, dim**-0.5, slots,
        HEADS=heads, HALF=half, BLOCK_HALF=triton.next_power_of_2(half), BLOCK=PAST_BLOCK, num_warps=4,
    )  # fmt: skip
    return out


@triton.jit
def _context_kernel(
    q, context, lengths, sums, largests, totals, scale, b, m, n, part_size, query_blocks,
    DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_QUERIES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0)
    sample = (tl.program_id(1) // query_blocks).to(tl.int64)
    query = (tl.program_id(1) % query_blocks) * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)
    column = tl.arange(0, BLOCK_DIM)
    wanted = (query < m)[:, None] & (column < DIM)[None, :]
    queries = tl.load(q + (sample * m + query)[:, None] * DIM + column[None, :], mask=wanted, other=0.0)
    first = part * part_size
    last = tl.minimum(first + part_size, tl.load(lengths + sample).to(tl.int32))
    largest = tl.full((BLOCK_QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_QUERIES,), tl.float32)
    weighed = tl.zeros((BLOCK_QUERIES, BLOCK_DIM), tl.float32)
    for begin in range(first, last, BLOCK):
        key = begin + tl.arange(0, BLOCK)
        there = (key < last)[:, None] & (column < DIM)[None, :]
        places = context + (sample * n + key)[:, None] * (2 * DIM) + column[None, :]
        keys = tl.load(places, mask=there, other=0.0)
        values = tl.load(places + DIM, mask=there, other=0.0)
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
        scores = tl.where((key < last)[None, :], scores, float("-inf"))
        larger = tl.maximum(largest, tl.max(scores, axis=1))
        shrink = tl.exp(largest - larger)
        weights = tl.exp(scores - larger[:, None])
        total = total * shrink + tl.sum(weights, axis=1)
        weighed = weighed * shrink[:, None] + tl.dot(weights.to(values.dtype), values, input_precision="ieee")
        largest = larger
    row = (part * b + sample) * m + query
    tl.store(sums + row[:, None] * DIM + column[None, :], weighed, mask=wanted)
    tl.store(largests + row, largest, mask=query < m)
    tl.store(totals + row, total, mask=query < m)


@triton.jit
def _join_kernel(
    sums, largests, totals, out, rows, parts, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_PARTS: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, BLOCK_PARTS)
    column = tl.arange(0, BLOCK_DIM)
    place = part * rows + row
    largest = tl.load(largests + place, mask=part < parts, other=float("-inf"))
    weights = tl.exp(largest - tl.max(largest, axis=0))
    total = tl.sum(weights * tl.load(totals + place, mask=part < parts, other=0.0), axis=0)
    there = (part < parts)[:, None] & (column < DIM)[None, :]
    weighed = tl.load(sums + place[:, None] * DIM + column[None, :], mask=there, other=0.0)
    joined = tl.sum(weighed * weights[:, None], axis=0) / total
    tl.store(out + row * DIM + column, joined.to(out.dtype.element_ty), mask=column < DIM)


def attend_to_context_triton(q: Tensor, context: Tensor, lengths: Tensor) -> Tensor:
    """As `attend_to_context`."""
    b, m, dim = q.shape
    n = context.shape[1]
    block_queries = min(MOST_QUERIES, max(16, triton.next_power_of_2(m)))
    query_blocks = triton.cdiv(m, block_queries)
    parts = min(MOST_PARTS, triton.cdiv(n, CONTEXT_BLOCK), max(1, PROGRAMS // (b * query_blocks)))
    part_size = triton.cdiv(triton.cdiv(n, parts), CONTEXT_BLOCK) * CONTEXT_BLOCK
    parts = triton.cdiv(n, part_size)
    sums = torch.empty(parts, b, m, dim, dtype=torch.float32, device=q.device)
    largests, totals = torch.empty(2, parts, b, m, dtype=torch.float32, device=q.device)
    out = torch.empty(b, m, dim, dtype=q.dtype, device=q.device)
    block_dim = max(16, triton.next_power_of_2(dim))
    _context_kernel[(parts, b * query_blocks)](
        q.contiguous(), context.contiguous(), lengths, sums, largests, totals, dim**-0.5,
        b, m, n, part_size, query_blocks,
        DIM=dim, BLOCK_DIM=block_dim, BLOCK_QUERIES=block_queries, BLOCK=CONTEXT_BLOCK, num_warps=4,
    )  # fmt: skip
    _join_kernel[(b * m,)](
        sums, largests, totals, out, b * m, parts,
        DIM=dim, BLOCK_DIM=block_dim, BLOCK_PARTS=triton.next_power_of_2(parts), num_warps=4,
    )  # fmt: skip
    return out
