"""RMSNorm whose input also goes on past it, as in every residual layer: both gradients meet in one kernel.

A layer computes `x + f(norm(x))`. Its backward pass adds the gradient that comes through `f` and the norm to the one
that comes past them. Autograd alone writes the first, then reads both and writes the sum; here one kernel does it.
"""

from typing import Any

import torch
from torch import Tensor
from torch.library import Library, register_fake

from colt5dist.ops.implementation import HAS_TRITON, INTERPRETED
from colt5dist.ops.rms_norm.reference import rms_norm_gradient_reference

if HAS_TRITON:
    from colt5dist.ops.rms_norm.triton import WIDEST, rms_norm_gradient_triton

__all__ = ["rms_norm_with_residual"]

_LIBRARY = Library("colt5dist", "FRAGMENT")
_LIBRARY.define(
    "rms_norm_gradient(Tensor x, Tensor rstd, Tensor gamma, Tensor grad_normed, Tensor? grad_input, bool triton)"
    " -> (Tensor, Tensor)"
)


def _gradient(
    x: Tensor, rstd: Tensor, gamma: Tensor, grad_normed: Tensor, grad_input: Tensor | None, triton: bool
) -> tuple[Tensor, Tensor]:
    if not triton or x.numel() == 0 or x.shape[-1] > WIDEST:
        return rms_norm_gradient_reference(x, rstd, gamma, grad_normed, grad_input)
    grad_input = None if grad_input is None else grad_input.contiguous()
    return rms_norm_gradient_triton(x.contiguous(), rstd, gamma, grad_normed.contiguous(), grad_input)


def _fake_gradient(
    x: Tensor, rstd: Tensor, gamma: Tensor, grad_normed: Tensor, grad_input: Tensor | None, triton: bool
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), torch.empty_like(gamma)


_LIBRARY.impl("rms_norm_gradient", _gradient, "CompositeExplicitAutograd")
register_fake("colt5dist::rms_norm_gradient", _fake_gradient, lib=_LIBRARY)


class _NormWithResidual(torch.autograd.Function):
    """x (..., dim) -> x itself, and its normalised form."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gamma: Tensor, eps: float, triton: bool) -> tuple[Tensor, Tensor]:
        normed, rstd = torch.ops.aten._fused_rms_norm(x, [x.shape[-1]], gamma, eps)
        ctx.save_for_backward(x, rstd, gamma)
        ctx.triton = triton
        return x.view_as(x), normed

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor, Tensor, None, None]:
        x, rstd, gamma = ctx.saved_tensors
        grad_input, grad_normed = grads
        assert grad_normed is not None
        grad_x, grad_gamma = torch.ops.colt5dist.rms_norm_gradient(x, rstd, gamma, grad_normed, grad_input, ctx.triton)
        return grad_x, grad_gamma, None, None


def rms_norm_with_residual(
    x: Tensor, gamma: Tensor, eps: float, *, implementation: str = "auto"
) -> tuple[Tensor, Tensor]:
    """The input for the residual's sum, and its normalised form for the layer's branch.

    Args:
        x: (..., dim) float32 or a 16-bit type.
        gamma: (dim,), of the type of x.
        eps: added to the mean square under the root, which is taken in float32.
        implementation: "triton" (CUDA tensors; CPU tensors under TRITON_INTERPRET=1), "reference", or "auto": triton
            for CUDA tensors.

    Returns:
        x, to be used for the residual's sum in place of the argument, and the normalised x (..., dim).
    """
    triton = HAS_TRITON and (implementation == "triton" or (implementation == "auto" and x.is_cuda))
    assert not triton or x.is_cuda or INTERPRETED
    return _NormWithResidual.apply(x, gamma, eps, triton)
