"""AdamW in Triton: one program a block of elements, each element read once and written once.

It is bound by memory. Divisions and roots are rounded as IEEE 754 says, which costs nothing beside the memory's time.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
# (kernels: a type beside an argument would mean something else to Triton)

import triton
import triton.language as tl
from torch import Tensor

from colt5dist.ops.adamw.reference import Scalars

BLOCK = 4096
_NUM_WARPS = 8


@triton.jit
def _adamw_kernel(
    weights,
    gradient,
    exp_avg,
    exp_avg_sq,
    copy,
    n,
    scale,
    decay,
    rest1,
    beta2,
    rest2,
    step_size,
    root_correction,
    eps,
    HAS_COPY: tl.constexpr,
    CLEAR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # int64: a tensor may have over 2**31 elements
    inside = places < n
    g = tl.load(gradient + places, mask=inside, other=0.0) * scale
    w = tl.load(weights + places, mask=inside, other=0.0)
    m = tl.load(exp_avg + places, mask=inside, other=0.0)
    v = tl.load(exp_avg_sq + places, mask=inside, other=0.0)
    w = w - decay * w
    m = m + rest1 * (g - m)
    v = beta2 * v + rest2 * g * g
    denominator = tl.div_rn(tl.sqrt_rn(v), root_correction) + eps
    w = w - step_size * tl.div_rn(m, denominator)
    tl.store(weights + places, w, mask=inside)
    tl.store(exp_avg + places, m, mask=inside)
    tl.store(exp_avg_sq + places, v, mask=inside)
    if HAS_COPY:
        tl.store(copy + places, w.to(copy.dtype.element_ty), mask=inside)
    if CLEAR:
        tl.store(gradient + places, tl.zeros([BLOCK], dtype=tl.float32), mask=inside)


def adamw_triton_(
    weights: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    copy: Tensor | None,
    scalars: Scalars,
    *,
    clear: bool,
) -> None:
    """As `colt5dist.ops.adamw.adamw_`, given the factors.

    The whole blocks are one launch and the rest another: of a multiple of 16 elements Triton knows that no vector of
    four is half inside, and moves whole vectors.
    """
    n = weights.numel()
    whole = n - n % BLOCK
    for first, last in ((0, whole), (whole, n)):
        if first == last:
            continue
        tensors = [tensor[first:last] for tensor in (weights, gradient, exp_avg, exp_avg_sq)]
        _adamw_kernel[(triton.cdiv(last - first, BLOCK),)](
            *tensors,
            tensors[0] if copy is None else copy[first:last],  # a place that HAS_COPY keeps from use
            last - first,
            *scalars,
            HAS_COPY=copy is not None,
            CLEAR=clear,
            BLOCK=BLOCK,
            num_warps=_NUM_WARPS,
        )
