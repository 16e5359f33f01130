"""The registered operators `colt5dist::local_attention` and its backward: launches of the Triton kernels.

One operator is one node of a compiled graph, whatever its shapes; activation checkpointing can keep or repeat it.
"""

# mypy: allow-untyped-defs
# (autograd's context has no type)

import torch
import triton
from torch import Tensor
from torch.library import Library, register_autograd, register_fake

from colt5dist.ops.local_attention.triton import forward_kernel, key_gradient_kernel, query_gradient_kernel

MAX_DIM = 256
"""Widest head for which a block of keys and of values stays on the chip."""


def _launch_settings(q: Tensor, mask: Tensor | None, bias: Tensor | None) -> tuple[int, dict]:
    """Programs of a kernel and its constants; by rule, so that every rank runs the same."""
    batch, heads, n, dim = q.shape
    padded = max(16, triton.next_power_of_2(dim))
    # the largest blocks whose tiles stay in registers; float32 products are made by the ordinary units, from registers
    if q.dtype == torch.float32:
        block, num_warps = 32 if padded <= 128 else 16, 8
    else:
        block, num_warps = 64 if padded <= 128 else 32, 4 if padded <= 64 else 8
    constants = {
        "BLOCK": block,
        "HEAD_DIM": dim,
        "DIM": padded,
        "HAS_MASK": mask is not None,
        "HAS_BIAS": bias is not None,
        "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
        "num_warps": num_warps,
        "num_stages": 2,
    }
    return batch * heads * triton.cdiv(n, block), constants


def _rows(x: Tensor) -> Tensor:
    """x (b, h, n, dim) with the numbers of a position side by side in memory."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _empty_like_projection(x: Tensor) -> Tensor:
    """(b, h, n, dim), laid in memory as (b, n, h, dim), as projections of tokens are: merging heads copies nothing."""
    b, h, n, dim = x.shape
    return x.new_empty((b, n, h, dim)).transpose(1, 2)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None, radius: int
) -> tuple[Tensor, Tensor]:
    q, k, v = _rows(q), _rows(k), _rows(v)
    out, log_sum = _fake_forward(q, k, v, mask, bias, radius)
    if out.numel() == 0:
        return out, log_sum
    programs, constants = _launch_settings(q, mask, bias)
    mask = q if mask is None else mask.contiguous()
    bias = q if bias is None else bias.contiguous()
    with torch.cuda.device_of(q):
        forward_kernel[(programs,)](
            q,
            k,
            v,
            mask,
            bias,
            out,
            log_sum,
            q.stride()[:3],
            k.stride()[:3],
            v.stride()[:3],
            out.stride()[:3],
            q.shape[1],
            q.shape[2],
            radius,
            q.shape[3] ** -0.5,
            **constants,
        )
    return out, log_sum


def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
    log_sum: Tensor,
    radius: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad, q, k, v, out = _rows(grad), _rows(q), _rows(k), _rows(v), _rows(out)
    grad_q, grad_k, grad_v, grad_bias = _fake_backward(grad, q, k, v, mask, bias, out, log_sum, radius)
    if out.numel() == 0:
        return grad_q, grad_k, grad_v, grad_bias.zero_()
    batch, heads, n, dim = q.shape
    programs, constants = _launch_settings(q, mask, bias)
    delta, log_sum = torch.empty_like(log_sum), log_sum.contiguous()
    shares = q.new_zeros((programs if bias is not None else 0, 2 * radius + 1), dtype=torch.float32)
    mask = q if mask is None else mask.contiguous()
    given_bias = q if bias is None else bias.contiguous()
    strides = [x.stride()[:3] for x in (grad, q, k, v)]
    numbers = (heads, n, radius, dim**-0.5)
    with torch.cuda.device_of(q):
        of_queries = (grad, q, k, v, mask, given_bias, out, log_sum, delta, grad_q, shares)
        query_gradient_kernel[(programs,)](
            *of_queries, *strides, out.stride()[:3], grad_q.stride()[:3], *numbers, **constants
        )
        of_keys = (grad, q, k, v, mask, given_bias, log_sum, delta, grad_k, grad_v)
        key_gradient_kernel[(programs,)](*of_keys, *strides, grad_k.stride()[:3], *numbers, **constants)
    if bias is not None:
        grad_bias.copy_(shares.view(batch, heads, -1, 2 * radius + 1).sum((0, 2)))
    return grad_q, grad_k, grad_v, grad_bias


def _fake_forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None, radius: int
) -> tuple[Tensor, Tensor]:
    return _empty_like_projection(q), q.new_empty(q.shape[:3], dtype=torch.float32)


def _fake_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
    log_sum: Tensor,
    radius: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grads = [_empty_like_projection(x) for x in (q, k, v)]
    return grads[0], grads[1], grads[2], q.new_empty(0) if bias is None else torch.empty_like(bias)


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.radius = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, *output)


def _gradient(ctx, grad, _grad_log_sum):
    saved = ctx.saved_tensors  # once: activation checkpointing refuses a second look
    grads = torch.ops.colt5dist.local_attention_backward(grad, *saved, ctx.radius)
    return *grads[:3], None, None if saved[4] is None else grads[3], None


_LIBRARY = Library("colt5dist", "FRAGMENT")
_LIBRARY.define(
    "local_attention(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? bias, int radius) -> (Tensor, Tensor)"
)
_LIBRARY.define(
    "local_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? bias, Tensor out, "
    "Tensor log_sum, int radius) -> (Tensor, Tensor, Tensor, Tensor)"
)
_LIBRARY.impl("local_attention", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("local_attention_backward", _backward, "CompositeExplicitAutograd")
register_fake("colt5dist::local_attention", _fake_forward, lib=_LIBRARY)
register_fake("colt5dist::local_attention_backward", _fake_backward, lib=_LIBRARY)
register_autograd("colt5dist::local_attention", _gradient, setup_context=_setup_context, lib=_LIBRARY)


def local_attention_triton(
    q: Tensor, k: Tensor, v: Tensor, *, radius: int, mask: Tensor | None, bias: Tensor | None
) -> Tensor:
    """Shapes as in `local_attention`; heads of up to MAX_DIM, float32 or 16-bit; fastest where q, k and v lie in memory
    as (batch, n, heads, dim), as the result does."""
    return torch.ops.colt5dist.local_attention(q, k, v, mask, bias, radius)[0]
