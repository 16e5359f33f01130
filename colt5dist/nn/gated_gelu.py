"""Gated GELU (Shazeer, arXiv 2002.05202), keeping only its argument for the backward pass."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class _GatedGELU(torch.autograd.Function):
    """The activation is computed again in the backward pass, so that neither it nor the product's factors are kept."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor) -> Tensor:
        ctx.save_for_backward(hidden)
        gate, value = hidden.chunk(2, dim=-1)
        return F.gelu(gate, approximate="tanh") * value

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (hidden,) = ctx.saved_tensors
        gate, value = hidden.chunk(2, dim=-1)
        grad_gate = torch.ops.aten.gelu_backward(grads[0] * value, gate, approximate="tanh")
        return torch.cat((grad_gate, grads[0] * F.gelu(gate, approximate="tanh")), dim=-1)


def gated_gelu(hidden: Tensor) -> Tensor:
    """hidden (..., 2 * n): gate, then value -> gelu(gate) * value (..., n), with the tanh form of GELU, as in
    T5.1.1."""
    return _GatedGELU.apply(hidden)
