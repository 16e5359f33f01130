"""Cross-entropy of rows of logits in two Triton kernels: one pass over the logits each.

Forward: logsumexp of a row, by a running maximum. Backward: the gradient of the logits, written over the logits:

    softmax * (grad_loss + grad_logsumexp) - onehot(target) * grad_loss

Rows that are masked are not read: their loss, logsumexp and gradient are 0.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
# (kernels: a type beside an argument would mean something else to Triton)

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096


@triton.jit
def _forward_kernel(logits, targets, valid, loss, normaliser, num_columns, BLOCK: tl.constexpr, HAS_MASK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    if HAS_MASK:
        is_valid = tl.load(valid + row) != 0
    else:
        is_valid = True
    if is_valid:
        start = logits + row * num_columns
        largest = tl.full((BLOCK,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK,), tl.float32)
        for first in range(0, num_columns, BLOCK):
            columns = first + tl.arange(0, BLOCK)
            tile = tl.load(start + columns, mask=columns < num_columns, other=float("-inf")).to(tl.float32)
            higher = tl.maximum(largest, tile)
            # -inf - -inf would be NaN: nothing is there to be scaled then
            scale = tl.where(largest == float("-inf"), 0.0, tl.exp(largest - higher))
            term = tl.where(tile == float("-inf"), 0.0, tl.exp(tile - higher))
            total = total * scale + term
            largest = higher
        most = tl.max(largest, axis=0)
        # a NaN in the row stays in `total`; maxima pass over it
        total = tl.sum(total * tl.where(largest == float("-inf"), 0.0, tl.exp(largest - most)), axis=0)
        log_sum = most + tl.log(total)
        chosen = tl.load(start + tl.load(targets + row)).to(tl.float32)
        tl.store(loss + row, log_sum - chosen)
        tl.store(normaliser + row, log_sum)
    else:
        tl.store(loss + row, 0.0)
        tl.store(normaliser + row, 0.0)


@triton.jit
def _backward_kernel(
    logits,
    targets,
    valid,
    normaliser,
    grad_loss,
    grad_normaliser,
    num_columns,
    BLOCK: tl.constexpr,
    HAS_MASK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    start = logits + row * num_columns
    if HAS_MASK:
        is_valid = tl.load(valid + row) != 0
    else:
        is_valid = True
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < num_columns
    if is_valid:
        of_loss = tl.load(grad_loss + row)
        of_both = of_loss + tl.load(grad_normaliser + row)
        log_sum = tl.load(normaliser + row)
        target = tl.load(targets + row)
        tile = tl.load(start + columns, mask=inside, other=0.0).to(tl.float32)
        gradient = tl.exp(tile - log_sum) * of_both
        gradient = tl.where(columns == target, gradient - of_loss, gradient)
        tl.store(start + columns, gradient.to(logits.dtype.element_ty), mask=inside)
    else:
        tl.store(start + columns, tl.zeros((BLOCK,), tl.float32).to(logits.dtype.element_ty), mask=inside)


def cross_entropy_triton(logits: Tensor, targets: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """As `cross_entropy_reference`."""
    rows, num_columns = logits.shape
    loss = torch.empty(rows, dtype=torch.float32, device=logits.device)
    normaliser = torch.empty_like(loss)
    if rows:
        mask = targets if valid is None else valid
        _forward_kernel[(rows,)](
            logits, targets, mask, loss, normaliser, num_columns, BLOCK=BLOCK, HAS_MASK=valid is not None, num_warps=8
        )
    return loss, normaliser


def cross_entropy_gradient_triton_(
    logits: Tensor,
    targets: Tensor,
    valid: Tensor | None,
    normaliser: Tensor,
    grad_loss: Tensor,
    grad_normaliser: Tensor,
) -> None:
    """As `cross_entropy_gradient_reference_`."""
    rows, num_columns = logits.shape
    if rows:
        mask = targets if valid is None else valid
        _backward_kernel[(rows, triton.cdiv(num_columns, BLOCK))](
            logits,
            targets,
            mask,
            normaliser,
            grad_loss,
            grad_normaliser,
            num_columns,
            BLOCK=BLOCK,
            HAS_MASK=valid is not None,
            num_warps=8,
        )
