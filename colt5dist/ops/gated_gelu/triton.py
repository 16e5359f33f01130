"""The backward pass of the gated GELU in one Triton kernel: both halves of the gradient from one read of the arguments.

gelu(g) = g * (1 + tanh(u)) / 2        with u = sqrt(2 / pi) * (g + 0.044715 * g^3)
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
# (kernels: a type beside an argument would mean something else to Triton)

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def _gradient_kernel(hidden, grad, grad_hidden, size, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < size
    start = hidden + row * 2 * size
    gate = tl.load(start + columns, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(start + size + columns, mask=inside, other=0.0).to(tl.float32)
    upstream = tl.load(grad + row * size + columns, mask=inside, other=0.0).to(tl.float32)
    inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
    # tanh by an exponential that cannot overflow
    decay = tl.exp(-2.0 * tl.abs(inner))
    tanh = (1.0 - decay) / (1.0 + decay)
    tanh = tl.where(inner < 0.0, -tanh, tanh)
    share = 0.5 * (1.0 + tanh)
    slope = share + 0.5 * gate * (1.0 - tanh * tanh) * 0.7978845608028654 * (1.0 + 0.134145 * gate * gate)
    target = grad_hidden + row * 2 * size
    dtype = grad_hidden.dtype.element_ty
    tl.store(target + columns, (upstream * value * slope).to(dtype), mask=inside)
    tl.store(target + size + columns, (upstream * gate * share).to(dtype), mask=inside)


def gated_gelu_gradient_triton(hidden: Tensor, grad: Tensor) -> Tensor:
    """As `gated_gelu_gradient_reference`; both tensors contiguous."""
    grad_hidden = torch.empty_like(hidden)
    size = grad.shape[-1]
    if grad.numel():
        rows = grad.numel() // size
        _gradient_kernel[(rows, triton.cdiv(size, BLOCK))](hidden, grad, grad_hidden, size, BLOCK=BLOCK, num_warps=4)
    return grad_hidden
