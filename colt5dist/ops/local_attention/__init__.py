"""Attention of each position to its neighbours within a radius: the light branch of conditional attention."""

import torch
from torch import Tensor

from colt5dist.ops.implementation import HAS_TRITON, INTERPRETED
from colt5dist.ops.local_attention.causal_windows import local_attention_causal_windows
from colt5dist.ops.local_attention.reference import local_attention_causal_reference, local_attention_reference
from colt5dist.ops.local_attention.windows import local_attention_windows

if HAS_TRITON:
    from colt5dist.ops.local_attention.operator import MAX_DIM, local_attention_triton

__all__ = ["IMPLEMENTATIONS", "local_attention"]

IMPLEMENTATIONS = ("auto", "reference", "windows", "triton")


def local_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    radius: int,
    causal: bool = False,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    implementation: str = "auto",
) -> Tensor:
    """softmax(q_i . k_j / sqrt(dim) + bias_{j-i}) v_j over the valid j with |i - j| <= radius.

    Positions are the caller's: rotate q and k before. CoLT5's radius is 127 (arXiv 2303.09752, section 3.1).

    Args:
        q: (batch, heads, n, dim), any n >= 1.
        k: of the shape and type of q.
        v: of the shape and type of q.
        radius: 1 or more.
        causal: whether the sequence is cut into windows of `radius` tokens, and i sees the valid j <= i of its own
            window and of the one before, as the package local-attention has it; without bias, by the implementations
            reference and windows.
        mask: (batch, n) bool, True = valid key; None: all.
        bias: (heads, 2 * radius + 1), its entry r for the key at i + r - radius; gets a gradient. None: 0.
        implementation: "reference" (the package local-attention), "windows" (PyTorch's fused kernels over windows; no
            bias), "triton" (CUDA tensors, CPU tensors under TRITON_INTERPRET=1; float32 and 16-bit, heads of up to
            256), or "auto": triton for CUDA tensors that it takes, else windows for CUDA tensors without bias, else the
            reference.

    Returns:
        The shape and type of q. A masked or too distant key has weight exactly 0 wherever at least one key within the
        radius is valid; elsewhere the output is finite and without meaning.

    Raises:
        ValueError: the shapes or types do not fit, radius < 1, or the implementation cannot serve.
    """
    if q.dim() != 4 or q.shape != k.shape or q.shape != v.shape:
        raise ValueError(
            f"q, k, v: {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}; use one shape (b, heads, n, dim)"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k, v: {q.dtype}, {k.dtype}, {v.dtype}; use one type")
    if radius < 1:
        raise ValueError(f"radius: {radius}; use 1 or more")
    if mask is not None and (mask.shape != (q.shape[0], q.shape[2]) or mask.dtype != torch.bool):
        raise ValueError(f"mask: {tuple(mask.shape)} of {mask.dtype}; use bool ({q.shape[0]}, {q.shape[2]})")
    if bias is not None and bias.shape != (q.shape[1], 2 * radius + 1):
        raise ValueError(f"bias: {tuple(bias.shape)}; use {(q.shape[1], 2 * radius + 1)}, a number a head and distance")
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation: {implementation!r}; use one of {', '.join(IMPLEMENTATIONS)}")
    if q.numel() == 0:
        empty = q + k + v
        return empty if bias is None else empty + 0.0 * bias.sum()
    obstacle = _obstacle_to_triton(q)
    if implementation == "auto":
        implementation = "reference" if not q.is_cuda else "triton" if obstacle is None and not causal else "windows"
        implementation = "reference" if implementation == "windows" and bias is not None else implementation
    if causal:
        if bias is not None or implementation == "triton":
            raise ValueError("causal: takes no bias, and no implementation 'triton'; use 'reference' or 'windows'")
        causal_form = (
            local_attention_causal_reference if implementation == "reference" else local_attention_causal_windows
        )
        return causal_form(q, k, v, radius=radius, mask=mask)
    if implementation == "triton":
        if obstacle is not None:
            raise ValueError(f"implementation: 'triton' {obstacle}; use 'reference'")
        return local_attention_triton(q, k, v, radius=radius, mask=mask, bias=bias)
    if implementation == "windows":
        if bias is not None:
            raise ValueError("implementation: 'windows' takes no bias; use 'reference' or 'triton'")
        return local_attention_windows(q, k, v, radius=radius, mask=mask)
    return local_attention_reference(q, k, v, radius=radius, mask=mask, bias=bias)


def _obstacle_to_triton(q: Tensor) -> str | None:
    """Why the Triton kernels cannot serve these queries; None if they can."""
    if not HAS_TRITON:
        return "needs the package triton, which is not installed"
    if not q.is_cuda and not INTERPRETED:
        return f"needs CUDA tensors, these are on {q.device.type}, or TRITON_INTERPRET=1 before Python starts"
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"takes float32 and 16-bit types, not {q.dtype}"
    if q.shape[-1] > MAX_DIM:
        return f"takes heads of up to {MAX_DIM}, not {q.shape[-1]}"
    return None
