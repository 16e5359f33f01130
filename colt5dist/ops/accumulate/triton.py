"""total += values for tensors of different types, in whole vectors."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
# (kernels: a type beside an argument would mean something else to Triton)

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048


@triton.jit
def _accumulate_kernel(total, values, n, BLOCK: tl.constexpr):
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = places < n
    added = tl.load(values + places, mask=inside).to(tl.float32)
    tl.store(total + places, tl.load(total + places, mask=inside) + added, mask=inside)


def accumulate_triton_(total: Tensor, values: Tensor) -> None:
    """As `accumulate_`."""
    if total.numel():
        _accumulate_kernel[(triton.cdiv(total.numel(), BLOCK),)](total, values, total.numel(), BLOCK=BLOCK, num_warps=4)
