"""Adds gradients of any floating type to a float32 sum."""

import torch
from torch import Tensor

from colt5dist.ops.implementation import HAS_TRITON, INTERPRETED

if HAS_TRITON:
    from colt5dist.ops.accumulate.triton import accumulate_triton_

__all__ = ["accumulate_"]


@torch.no_grad()
def accumulate_(total: Tensor, values: Tensor, *, implementation: str = "auto") -> None:
    """total += values, or total += their sum over rows in float32, in place.

    `Tensor.add_` does the same; where the types differ it reads and writes one element at a time, and reaches about
    half of a GPU's memory bandwidth.

    Args:
        total: (n,) float32, contiguous.
        values: (n,) of a floating type, contiguous; or (r, n), whose rows are contiguous, and are added up in order.
        implementation: "triton" (CUDA tensors; CPU tensors under TRITON_INTERPRET=1), "reference" (PyTorch), or "auto":
            triton for CUDA tensors.
    """
    triton = implementation == "triton" or (implementation == "auto" and total.is_cuda and HAS_TRITON)
    if triton:
        assert total.is_cuda or INTERPRETED
        accumulate_triton_(total, values)
    elif values.dim() == 1:
        total += values
    else:
        added = values[0].float()
        for row in values[1:]:
            added = added + row
        total += added
