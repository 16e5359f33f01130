"""Softmax attention through PyTorch's fused kernels, which never hold the (queries x keys) matrix in memory."""

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from colt5dist.ops.masked_attention import masked_attention


def attend(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """softmax(q k^T / sqrt(dim)) v.

    Where no fused kernel takes the types and shapes, as for float64 on CUDA, PyTorch falls back to plain products,
    which do hold the matrix.

    Args:
        q: (b, h, i, dim).
        k: (b, h, j, dim).
        v: (b, h, j, dim).
        mask: (b, j), (b, 1, j) or (b, h, j) bool, True = valid key, or (b, 1, i, j) or (b, h, i, j), query by query;
            None: all.
        causal: whether query i sees the keys up to i only; not with a mask.

    Returns:
        (b, h, i, dim). A masked key has weight exactly 0. Where a row of the mask has no valid key the output is
        exactly 0, and so are its gradients.
    """
    if mask is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    if causal:
        raise ValueError("causal: takes no mask; put the padding at the end")
    return masked_attention(q, k, v, mask.unsqueeze(1) if mask.dim() == 2 else mask)


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """(b, n, h * dim) -> (b, h, n, dim)."""
    return rearrange(x, "b n (h d) -> b h n d", h=num_heads)


def merge_heads(x: Tensor) -> Tensor:
    """(b, h, n, dim) -> (b, n, h * dim)."""
    return rearrange(x, "b h n d -> b n (h d)")
