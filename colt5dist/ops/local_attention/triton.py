"""Local attention in Triton: each block of queries visits only the blocks of keys that its band touches.

With s_ij = q_i . k_j / sqrt(dim) + bias_{j-i}, p = softmax(s) over the valid j with |i - j| <= radius, o_i = sum_j p_ij
v_j and g = dL/do:

    dL/dv_j = sum_i p_ij g_i
    ds_ij   = p_ij (g_i . v_j - delta_i),  delta_i = g_i . o_i
    dL/dq_i = sum_j ds_ij k_j / sqrt(dim)        dL/dk_j = sum_i ds_ij q_i / sqrt(dim)
    dL/dbias_r = sum of ds_ij over j - i = r

The forward keeps o and the logarithm (to base 2, as all exponents here) of each row's sum; the backward computes p
again. One kernel sums over the keys of a block of queries and gives dq, delta and the block's share of dbias, one over
the queries of a block of keys and gives dk and dv. No sum is made with atomics: results do not depend on the order in
which programs run. Scores and sums are float32; 16-bit weights are rounded before they multiply 16-bit values.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
# (kernels: a type beside an argument would mean something else to Triton)

import math

import triton
import triton.language as tl

LOG2_E = tl.constexpr(math.log2(math.e))


@triton.jit
def _tile(base, positions, stride, n, HEAD_DIM: tl.constexpr, DIM: tl.constexpr):
    """Rows of one head at some positions, (positions, DIM); 0 outside the sequence and beyond HEAD_DIM."""
    columns = tl.arange(0, DIM)
    inside = (positions < n)[:, None] & (columns < HEAD_DIM)[None, :]
    return tl.load(base + positions[:, None].to(tl.int64) * stride + columns[None, :], mask=inside, other=0.0)


@triton.jit
def _store_tile(base, positions, stride, n, tile, HEAD_DIM: tl.constexpr, DIM: tl.constexpr):
    columns = tl.arange(0, DIM)
    inside = (positions < n)[:, None] & (columns < HEAD_DIM)[None, :]
    pointers = base + positions[:, None].to(tl.int64) * stride + columns[None, :]
    tl.store(pointers, tile.to(base.dtype.element_ty), mask=inside)


@triton.jit
def _scores(products, queries, keys, mask, bias, n, radius, scale, HAS_MASK: tl.constexpr, HAS_BIAS: tl.constexpr):
    """Products q . k -> scores to base 2, -inf where the query does not see the key.

    queries and keys are positions that broadcast to the products' shape; mask and bias are the sample's and the head's.
    """
    offset = keys - queries
    seen = (offset <= radius) & (offset >= -radius) & (keys < n)
    if HAS_MASK:
        seen = seen & tl.load(mask + keys, mask=keys < n, other=0).to(tl.int1)
    scores = products * (scale * LOG2_E)
    if HAS_BIAS:
        scores += tl.load(bias + (offset + radius), mask=seen, other=0.0).to(tl.float32) * LOG2_E
    return tl.where(seen, scores, float("-inf"))


@triton.jit
def _place(n, heads, BLOCK: tl.constexpr):
    """First position, sample and head of this program's block."""
    blocks = tl.cdiv(n, BLOCK)
    sample_and_head = (tl.program_id(0) // blocks).to(tl.int64)
    return (tl.program_id(0) % blocks) * BLOCK, sample_and_head // heads, sample_and_head % heads


@triton.jit
def _head(pointer, sample, head, sample_stride, head_stride):
    return pointer + sample * sample_stride + head * head_stride


@triton.jit
def forward_kernel(
    q,
    k,
    v,
    mask,
    bias,
    out,
    row_log_sum,
    q_strides,
    k_strides,
    v_strides,
    out_strides,
    heads,
    n,
    radius,
    scale,
    BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    first, sample, head = _place(n, heads, BLOCK)
    rows, mask, bias = (sample * heads + head) * n, mask + sample * n, bias + head * (2 * radius + 1)
    queries = first + tl.arange(0, BLOCK)
    q_tile = _tile(_head(q, sample, head, q_strides[0], q_strides[1]), queries, q_strides[2], n, HEAD_DIM, DIM)
    k_head = _head(k, sample, head, k_strides[0], k_strides[1])
    v_head = _head(v, sample, head, v_strides[0], v_strides[1])
    largest = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    result = tl.zeros((BLOCK, DIM), tl.float32)
    for start in tl.range(tl.maximum(first - radius, 0) // BLOCK * BLOCK, tl.minimum(first + BLOCK + radius, n), BLOCK):
        keys = start + tl.arange(0, BLOCK)
        k_tile = _tile(k_head, keys, k_strides[2], n, HEAD_DIM, DIM)
        products = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
        scores = _scores(products, queries[:, None], keys[None, :], mask, bias, n, radius, scale, HAS_MASK, HAS_BIAS)
        new_largest = tl.maximum(largest, tl.max(scores, 1))
        # a row that has seen no key yet has nothing to compare with
        pivot = tl.where(new_largest == float("-inf"), 0.0, new_largest)
        shrink = tl.exp2(largest - pivot)
        weights = tl.exp2(scores - pivot[:, None])
        v_tile = _tile(v_head, keys, v_strides[2], n, HEAD_DIM, DIM)
        result = result * shrink[:, None]
        result = tl.dot(weights.to(v_tile.dtype), v_tile, result, input_precision=PRECISION)
        total = total * shrink + tl.sum(weights, 1)
        largest = new_largest
    sees_none = total == 0.0
    total = tl.where(sees_none, 1.0, total)
    log_sum = tl.where(sees_none, 0.0, largest + tl.log2(total))
    tl.store(row_log_sum + rows + queries, log_sum, mask=queries < n)
    out_head = _head(out, sample, head, out_strides[0], out_strides[1])
    _store_tile(out_head, queries, out_strides[2], n, result / total[:, None], HEAD_DIM, DIM)


@triton.jit
def query_gradient_kernel(
    grad,
    q,
    k,
    v,
    mask,
    bias,
    out,
    row_log_sum,
    delta,
    grad_q,
    bias_shares,
    grad_strides,
    q_strides,
    k_strides,
    v_strides,
    out_strides,
    grad_q_strides,
    heads,
    n,
    radius,
    scale,
    BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Writes delta (rows), dq, and, with a bias, this block's share of its gradient, (programs, 2 * radius + 1)."""
    first, sample, head = _place(n, heads, BLOCK)
    rows, mask, bias = (sample * heads + head) * n, mask + sample * n, bias + head * (2 * radius + 1)
    queries = first + tl.arange(0, BLOCK)
    q_tile = _tile(_head(q, sample, head, q_strides[0], q_strides[1]), queries, q_strides[2], n, HEAD_DIM, DIM)
    grad_head = _head(grad, sample, head, grad_strides[0], grad_strides[1])
    grad_tile = _tile(grad_head, queries, grad_strides[2], n, HEAD_DIM, DIM)
    out_head = _head(out, sample, head, out_strides[0], out_strides[1])
    out_tile = _tile(out_head, queries, out_strides[2], n, HEAD_DIM, DIM)
    log_sum = tl.load(row_log_sum + rows + queries, mask=queries < n, other=0.0)
    row_delta = tl.sum(grad_tile.to(tl.float32) * out_tile.to(tl.float32), 1)
    tl.store(delta + rows + queries, row_delta, mask=queries < n)
    k_head = _head(k, sample, head, k_strides[0], k_strides[1])
    v_head = _head(v, sample, head, v_strides[0], v_strides[1])
    share = bias_shares + tl.program_id(0).to(tl.int64) * (2 * radius + 1)
    place = tl.arange(0, BLOCK)
    carried = tl.zeros((BLOCK,), tl.float32)
    result = tl.zeros((BLOCK, DIM), tl.float32)
    start_of_keys = tl.maximum(first - radius, 0) // BLOCK * BLOCK
    end_of_keys = tl.minimum(first + BLOCK + radius, n)
    for start in tl.range(start_of_keys, end_of_keys, BLOCK):
        keys = start + tl.arange(0, BLOCK)
        k_tile = _tile(k_head, keys, k_strides[2], n, HEAD_DIM, DIM)
        products = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
        scores = _scores(products, queries[:, None], keys[None, :], mask, bias, n, radius, scale, HAS_MASK, HAS_BIAS)
        weights = tl.exp2(scores - log_sum[:, None])
        v_tile = _tile(v_head, keys, v_strides[2], n, HEAD_DIM, DIM)
        grad_weights = tl.dot(grad_tile, tl.trans(v_tile), input_precision=PRECISION)
        grad_scores = weights * (grad_weights - row_delta[:, None])
        result = tl.dot(grad_scores.to(k_tile.dtype), k_tile, result, input_precision=PRECISION)
        if HAS_BIAS:
            # column t of the turned tile holds the offsets start - first + t, and, further down, BLOCK less
            column = place[:, None] + place[None, :]
            turned = tl.gather(grad_scores, column % BLOCK, 1)
            lower = carried + tl.sum(tl.where(column >= BLOCK, turned, 0.0), 0)
            carried = tl.sum(tl.where(column < BLOCK, turned, 0.0), 0)
            offset = start - BLOCK - first + place + radius
            tl.store(share + offset, lower, mask=(offset >= 0) & (offset <= 2 * radius))
            if start + BLOCK >= end_of_keys:
                further = offset + BLOCK
                tl.store(share + further, carried, mask=(further >= 0) & (further <= 2 * radius))
    grad_q_head = _head(grad_q, sample, head, grad_q_strides[0], grad_q_strides[1])
    _store_tile(grad_q_head, queries, grad_q_strides[2], n, result * scale, HEAD_DIM, DIM)


@triton.jit
def key_gradient_kernel(
    grad,
    q,
    k,
    v,
    mask,
    bias,
    row_log_sum,
    delta,
    grad_k,
    grad_v,
    grad_strides,
    q_strides,
    k_strides,
    v_strides,
    grad_k_strides,
    heads,
    n,
    radius,
    scale,
    BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Writes dk and dv, which have the same strides. Tiles of scores lie as (keys, queries)."""
    first, sample, head = _place(n, heads, BLOCK)
    rows, mask, bias = (sample * heads + head) * n, mask + sample * n, bias + head * (2 * radius + 1)
    keys = first + tl.arange(0, BLOCK)
    k_tile = _tile(_head(k, sample, head, k_strides[0], k_strides[1]), keys, k_strides[2], n, HEAD_DIM, DIM)
    v_tile = _tile(_head(v, sample, head, v_strides[0], v_strides[1]), keys, v_strides[2], n, HEAD_DIM, DIM)
    q_head = _head(q, sample, head, q_strides[0], q_strides[1])
    grad_head = _head(grad, sample, head, grad_strides[0], grad_strides[1])
    k_result = tl.zeros((BLOCK, DIM), tl.float32)
    v_result = tl.zeros((BLOCK, DIM), tl.float32)
    for start in tl.range(tl.maximum(first - radius, 0) // BLOCK * BLOCK, tl.minimum(first + BLOCK + radius, n), BLOCK):
        queries = start + tl.arange(0, BLOCK)
        q_tile = _tile(q_head, queries, q_strides[2], n, HEAD_DIM, DIM)
        grad_tile = _tile(grad_head, queries, grad_strides[2], n, HEAD_DIM, DIM)
        log_sum = tl.load(row_log_sum + rows + queries, mask=queries < n, other=0.0)
        row_delta = tl.load(delta + rows + queries, mask=queries < n, other=0.0)
        products = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION)
        scores = _scores(products, queries[None, :], keys[:, None], mask, bias, n, radius, scale, HAS_MASK, HAS_BIAS)
        weights = tl.exp2(scores - log_sum[None, :])
        v_result = tl.dot(weights.to(grad_tile.dtype), grad_tile, v_result, input_precision=PRECISION)
        grad_weights = tl.dot(v_tile, tl.trans(grad_tile), input_precision=PRECISION)
        grad_scores = weights * (grad_weights - row_delta[None, :])
        k_result = tl.dot(grad_scores.to(q_tile.dtype), q_tile, k_result, input_precision=PRECISION)
    grad_k_head = _head(grad_k, sample, head, grad_k_strides[0], grad_k_strides[1])
    grad_v_head = _head(grad_v, sample, head, grad_k_strides[0], grad_k_strides[1])
    _store_tile(grad_k_head, keys, grad_k_strides[2], n, k_result * scale, HEAD_DIM, DIM)
    _store_tile(grad_v_head, keys, grad_k_strides[2], n, v_result, HEAD_DIM, DIM)
