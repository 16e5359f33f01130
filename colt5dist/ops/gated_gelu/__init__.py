"""Gated GELU (Shazeer, arXiv 2002.05202), keeping only its argument for the backward pass."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import Library, register_fake

from colt5dist.ops.gated_gelu.reference import gated_gelu_gradient_reference
from colt5dist.ops.implementation import HAS_TRITON, INTERPRETED

if HAS_TRITON:
    from colt5dist.ops.gated_gelu.triton import gated_gelu_gradient_triton

__all__ = ["gated_gelu"]

_LIBRARY = Library("colt5dist", "FRAGMENT")
_LIBRARY.define("gated_gelu_gradient(Tensor hidden, Tensor grad) -> Tensor")


def _gradient(hidden: Tensor, grad: Tensor) -> Tensor:
    return gated_gelu_gradient_triton(hidden.contiguous(), grad.contiguous())


def _fake_gradient(hidden: Tensor, grad: Tensor) -> Tensor:
    return hidden.new_empty(hidden.shape)


_LIBRARY.impl("gated_gelu_gradient", _gradient, "CompositeExplicitAutograd")
register_fake("colt5dist::gated_gelu_gradient", _fake_gradient, lib=_LIBRARY)


class _GatedGELU(torch.autograd.Function):
    """The activation is computed again in the backward pass, so that neither it nor the product's factors are kept."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, triton: bool) -> Tensor:
        ctx.save_for_backward(hidden)
        ctx.triton = triton
        gate, value = hidden.chunk(2, dim=-1)
        return F.gelu(gate, approximate="tanh") * value

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (hidden,) = ctx.saved_tensors
        if ctx.triton:
            return torch.ops.colt5dist.gated_gelu_gradient(hidden, grads[0]), None
        return gated_gelu_gradient_reference(hidden, grads[0]), None


def gated_gelu(hidden: Tensor, *, implementation: str = "auto") -> Tensor:
    """gelu(gate) * value, with the tanh form of GELU, as in T5.1.1.

    Args:
        hidden: (..., 2 * n), gate, then value.
        implementation: of the backward pass: "triton" (CUDA tensors; CPU tensors under TRITON_INTERPRET=1),
            "reference" (PyTorch), or "auto": triton for CUDA tensors, except float64.

    Returns:
        (..., n).
    """
    triton = implementation == "triton"
    if implementation == "auto":
        triton = HAS_TRITON and hidden.is_cuda and hidden.dtype != torch.float64
    assert not triton or hidden.is_cuda or INTERPRETED
    return _GatedGELU.apply(hidden, triton)
