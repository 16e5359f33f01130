"""Cross-entropy of a token's hidden state with the output embedding, its logits read once in each direction.

The logits are kept for the backward pass in the type of the products, and their gradient is written over them: no
second product makes them again, and no float32 copy is ever made.
"""

from typing import Any

import torch
from torch import Tensor

from colt5dist.ops.cross_entropy.reference import cross_entropy_gradient_reference_, cross_entropy_reference
from colt5dist.ops.implementation import HAS_TRITON, INTERPRETED

if HAS_TRITON:
    from colt5dist.ops.cross_entropy.triton import cross_entropy_gradient_triton_, cross_entropy_triton

__all__ = ["vocabulary_cross_entropy"]


class _VocabularyCrossEntropy(torch.autograd.Function):
    """hidden (t, d), weight (v, d), targets (t,), valid (t,) or None -> loss and logsumexp, each (t,) float32."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, valid: Tensor | None, triton: bool
    ) -> tuple[Tensor, Tensor]:
        logits = hidden @ weight.t()
        loss, normaliser = (cross_entropy_triton if triton else cross_entropy_reference)(logits, targets, valid)
        ctx.save_for_backward(hidden, weight, targets, valid, normaliser)
        ctx.logits, ctx.triton = logits, triton
        return loss, normaliser

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        hidden, weight, targets, valid, normaliser = ctx.saved_tensors
        logits, ctx.logits = ctx.logits, None
        if logits is None:
            raise RuntimeError("vocabulary_cross_entropy: its backward pass runs once; the logits are overwritten")
        gradient_ = cross_entropy_gradient_triton_ if ctx.triton else cross_entropy_gradient_reference_
        gradient_(logits, targets, valid, normaliser, grads[0].contiguous(), grads[1].contiguous())
        return logits @ weight, logits.t() @ hidden, None, None, None


def vocabulary_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, valid: Tensor | None = None, *, implementation: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of `hidden @ weight.t()` with the targets.

    Args:
        hidden: (t, d).
        weight: (v, d), of the type of `hidden`.
        targets: (t,) int64.
        valid: (t,) bool, True = counts; None: all. The others are not read.
        implementation: "triton" (CUDA tensors; CPU tensors under TRITON_INTERPRET=1), "reference" (PyTorch), or "auto":
            triton for CUDA tensors.

    Returns:
        Cross-entropy in nats and logsumexp of the logits, each (t,) float32 and 0 where not valid.
    """
    triton = HAS_TRITON and (implementation == "triton" or (implementation == "auto" and hidden.is_cuda))
    assert not triton or hidden.is_cuda or INTERPRETED
    loss, normaliser = _VocabularyCrossEntropy.apply(hidden, weight, targets, valid, triton)
    return loss, normaliser
