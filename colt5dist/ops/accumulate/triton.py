"""total += values for tensors of different types, in whole vectors."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
# (kernels: a type beside an argument would mean something else to Triton)

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048


@triton.jit
def _accumulate_kernel(total, values, n, num_rows, row_stride, BLOCK: tl.constexpr):
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = places < n
    row = values + places
    added = tl.load(row, mask=inside).to(tl.float32)
    for _ in range(1, num_rows):
        row += row_stride
        added += tl.load(row, mask=inside).to(tl.float32)
    tl.store(total + places, tl.load(total + places, mask=inside) + added, mask=inside)


def accumulate_triton_(total: Tensor, values: Tensor) -> None:
    """As `accumulate_`."""
    num_rows, row_stride = (1, 0) if values.dim() == 1 else (values.shape[0], values.stride(0))
    if total.numel():
        grid = (triton.cdiv(total.numel(), BLOCK),)
        _accumulate_kernel[grid](total, values, total.numel(), num_rows, row_stride, BLOCK=BLOCK, num_warps=4)
