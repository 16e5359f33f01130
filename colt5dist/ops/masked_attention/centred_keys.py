"""The registered operators `colt5dist::attention_with_zero_keys` and its backward: PyTorch's kernels without a mask.

PyTorch's fused kernels are called by themselves, and not by `scaled_dot_product_attention`, because the logarithms of
their sums are needed: cuDNN's from compute capability 9.0 on, where it is the fastest, and elsewhere FlashAttention's.
"""

# mypy: allow-untyped-defs
# (autograd's context has no type)

import torch
from torch import Tensor
from torch.library import Library, register_autograd, register_fake

MAX_DIM = 128
"""Widest head of the fused kernels."""
aten = torch.ops.aten


def obstacle_to_centred_keys(q: Tensor, k: Tensor) -> str | None:
    """Why the fused kernels cannot serve these queries and keys; None if they can."""
    if not q.numel() or not k.numel():
        return "takes no empty tensors"
    is_short = q.dtype in (torch.bfloat16, torch.float16)
    if not q.is_cuda:
        return (
            f"takes float32 and float64 on CPUs, not {q.dtype}: the sums of the kernel there are rounded" * is_short
            or None
        )
    if not is_short:
        return f"takes 16-bit types on CUDA, not {q.dtype}"
    if q.shape[-1] > MAX_DIM or q.shape[-1] % 8:
        return f"takes heads of a multiple of 8 up to {MAX_DIM} on CUDA, not {q.shape[-1]}"
    if q.shape[2] == 1 or k.shape[2] == 1:
        return "takes more than one query and one key on CUDA"
    # not flash_sdp_enabled, which torch.compile cannot trace; it does not switch off what is called directly
    if torch.cuda.get_device_capability(q.device) < (8, 0):
        return "needs FlashAttention, so a GPU of compute capability 8.0 or more"
    return None


def _takes_cudnn(q: Tensor) -> bool:
    """Whether cuDNN's kernels serve, not FlashAttention's."""
    return torch.backends.cuda.cudnn_sdp_enabled() and torch.cuda.get_device_capability(q.device) >= (9, 0)


def _as_projection(x: Tensor) -> Tensor:
    """x (b, h, n, dim), laid in memory as (b, n, h, dim), as projections are: merging heads copies nothing."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _empty_like_projection(x: Tensor) -> Tensor:
    b, h, n, dim = x.shape
    return x.new_empty((b, n, h, dim)).transpose(1, 2)


def _forward(q: Tensor, k: Tensor, v: Tensor, num_zero: Tensor) -> tuple[Tensor, Tensor]:
    if not q.is_cuda:
        out, log_sum = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    elif _takes_cudnn(q):
        out, log_sum = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True)[:2]
    else:
        out, log_sum = aten._scaled_dot_product_flash_attention(q, k, v)[:2]
    log_sum = log_sum.reshape(q.shape[:3])
    num_zero = num_zero.unsqueeze(-1)
    some_valid = num_zero < k.shape[2]
    # by Jensen's inequality it is at most the share of the keys, whatever the kernel's rounding
    share = torch.minimum(num_zero * torch.exp(-log_sum), num_zero / k.shape[2])
    # with no valid key: output 0, and weights of 0 in the backward pass
    factor = torch.where(some_valid, 1.0 / (1.0 - share), 0.0)
    log_sum = torch.where(some_valid, log_sum + torch.log1p(-share), torch.inf)
    return torch.mul(out, factor.unsqueeze(-1), out=_empty_like_projection(q)), log_sum.contiguous()


def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sum: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    if not q.is_cuda:
        # this kernel takes them with the queries before the heads
        log_sum = log_sum.transpose(1, 2).contiguous().transpose(1, 2)
        grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(grad, q, k, v, out, log_sum, 0.0, False)
    else:
        # all rows have the same lengths, so the tensors that would give each row's are not there, and
        # without dropout the kernels do not look at the state of their random numbers
        state = torch.empty(0, dtype=torch.int64, device=q.device)
        lengths = (None, None, q.shape[2], k.shape[2])
        if _takes_cudnn(q):
            grads = aten._scaled_dot_product_cudnn_attention_backward(
                grad, q, k, v, out, log_sum.unsqueeze(-1), state, state, None, *lengths, 0.0, False
            )
        else:
            grads = aten._scaled_dot_product_flash_attention_backward(
                grad, q, k, v, out, log_sum, *lengths, 0.0, False, state, state
            )
    return _as_projection(grads[0]), _as_projection(grads[1]), _as_projection(grads[2])


def _fake_forward(q: Tensor, k: Tensor, v: Tensor, num_zero: Tensor) -> tuple[Tensor, Tensor]:
    return _empty_like_projection(q), q.new_empty(q.shape[:3], dtype=num_zero.dtype)


def _fake_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sum: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_like_projection(q), _empty_like_projection(k), _empty_like_projection(v)


def _setup_context(ctx, inputs, output) -> None:
    q, k, v, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, k, v, *output)


def _gradient(ctx, grad, _grad_log_sum):
    saved = ctx.saved_tensors  # once: activation checkpointing refuses a second look
    return *torch.ops.colt5dist.attention_with_zero_keys_backward(grad, *saved), None


_LIBRARY = Library("colt5dist", "FRAGMENT")
_LIBRARY.define("attention_with_zero_keys(Tensor q, Tensor k, Tensor v, Tensor num_zero) -> (Tensor, Tensor)")
_LIBRARY.define(
    "attention_with_zero_keys_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor log_sum) "
    "-> (Tensor, Tensor, Tensor)"
)
_LIBRARY.impl("attention_with_zero_keys", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("attention_with_zero_keys_backward", _backward, "CompositeExplicitAutograd")
register_fake("colt5dist::attention_with_zero_keys", _fake_forward, lib=_LIBRARY)
register_fake("colt5dist::attention_with_zero_keys_backward", _fake_backward, lib=_LIBRARY)
register_autograd("colt5dist::attention_with_zero_keys", _gradient, setup_context=_setup_context, lib=_LIBRARY)


def attention_with_zero_keys(q: Tensor, k: Tensor, v: Tensor, num_zero: Tensor) -> Tensor:
    """Attention to the keys that are not 0.

    Args:
        q: (b, h, i, dim).
        k: (b, h, j, dim); some keys are 0, and the mean of the others is 0.
        v: (b, h, j, dim), 0 for the same.
        num_zero: (b, 1) or (b, h), how many keys are 0; float64 for float64, else float32.

    Returns:
        (b, h, i, dim).
    """
    return torch.ops.colt5dist.attention_with_zero_keys(q, k, v, num_zero)[0]
