"""The backward pass of RMSNorm in one Triton kernel, the gradient that reaches the same input on another way added.

With x_hat = x * rstd and w = grad_normed * gamma, the gradient of the input is

    rstd * (w - x_hat * mean(w * x_hat)) + grad_input,        and that of gamma is the sum over rows of grad * x_hat.

A program takes rows in strides of the number of programs and keeps its part of gamma's gradient in registers; the parts
are added in a fixed order, so that the result is the same bits every time.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
# (kernels: a type beside an argument would mean something else to Triton)

import torch
import triton
import triton.language as tl
from torch import Tensor

WIDEST = 8192
"""Widest row that a program holds in its registers."""
PROGRAMS_PER_PROCESSOR = 12


@triton.jit
def _gradient_kernel(
    x,
    rstd,
    gamma,
    grad_normed,
    grad_input,
    grad_x,
    gamma_parts,
    num_rows,
    dim,
    BLOCK: tl.constexpr,
    HAS_GRAD_INPUT: tl.constexpr,
):
    columns = tl.arange(0, BLOCK)
    valid = columns < dim
    weight = tl.load(gamma + columns, mask=valid, other=0.0).to(tl.float32)
    gamma_part = tl.zeros((BLOCK,), tl.float32)
    for row in tl.range(tl.program_id(0), num_rows, tl.num_programs(0)):
        places = (tl.full((), 0, tl.int64) + row) * dim + columns
        grad = tl.load(grad_normed + places, mask=valid, other=0.0).to(tl.float32)
        scale = tl.load(rstd + row)
        unit = tl.load(x + places, mask=valid, other=0.0).to(tl.float32) * scale
        if HAS_GRAD_INPUT:
            other = tl.load(grad_input + places, mask=valid, other=0.0).to(tl.float32)
        weighted = grad * weight
        result = scale * (weighted - unit * (tl.sum(weighted * unit, axis=0) / dim))
        if HAS_GRAD_INPUT:
            result += other
        tl.store(grad_x + places, result.to(grad_x.dtype.element_ty), mask=valid)
        gamma_part += grad * unit
    tl.store(gamma_parts + tl.program_id(0) * dim + columns, gamma_part, mask=valid)


def rms_norm_gradient_triton(
    x: Tensor, rstd: Tensor, gamma: Tensor, grad_normed: Tensor, grad_input: Tensor | None
) -> tuple[Tensor, Tensor]:
    """As `rms_norm_gradient_reference`; all tensors contiguous, rows at most WIDEST wide."""
    dim = x.shape[-1]
    num_rows = x.numel() // dim
    block = max(16, triton.next_power_of_2(dim))
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1
    # one warp a row of up to 1024: sums need no other warp; as many programs as fill the device's warps
    num_warps = max(1, block // 1024)
    programs = max(1, min(PROGRAMS_PER_PROCESSOR // num_warps * processors, num_rows))
    grad_x = torch.empty_like(x)
    gamma_parts = torch.empty((programs, dim), dtype=torch.float32, device=x.device)
    _gradient_kernel[(programs,)](
        x,
        rstd,
        gamma,
        grad_normed,
        x if grad_input is None else grad_input,
        grad_x,
        gamma_parts,
        num_rows,
        dim,
        BLOCK=block,
        HAS_GRAD_INPUT=grad_input is not None,
        num_warps=num_warps,
    )
    return grad_x, gamma_parts.sum(0).to(gamma.dtype)
