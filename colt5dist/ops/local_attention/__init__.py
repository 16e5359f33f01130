"""Attention of each position to its neighbours within a radius: the light branch of conditional attention."""

import torch
from torch import Tensor

from colt5dist.ops.local_attention.causal_windows import local_attention_causal_windows
from colt5dist.ops.local_attention.reference import local_attention_causal_reference, local_attention_reference
from colt5dist.ops.local_attention.windows import local_attention_windows

__all__ = ["local_attention"]

_IMPLEMENTATIONS = {"reference": local_attention_reference, "windows": local_attention_windows}
_CAUSAL_IMPLEMENTATIONS = {"reference": local_attention_causal_reference, "windows": local_attention_causal_windows}


def local_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    radius: int,
    causal: bool = False,
    mask: Tensor | None = None,
    implementation: str = "auto",
) -> Tensor:
    """softmax(q_i . k_j / sqrt(dim)) v_j over the valid j with |i - j| <= radius.

    q, k, v (batch, heads, n, dim) of one shape and type, any n >= 1; mask (batch, n) bool, True = valid key, None =
    all. Returns the shape and type of q. A masked or too distant key has weight exactly 0 wherever at least one key
    within the radius is valid; elsewhere the output is finite and without meaning. causal: the sequence lies in windows
    of `radius` tokens, and i sees the valid j <= i of its own window and of the one before, as the package
    local-attention has it. Positions are the caller's: rotate
    q and k before. CoLT5's radius is 127 (arXiv 2303.09752, section 3.1). Raises ValueError where the shapes do not
    fit or radius < 1.
    """
    if q.dim() != 4 or q.shape != k.shape or q.shape != v.shape:
        raise ValueError(
            f"q, k, v: {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}; use one shape (b, heads, n, dim)"
        )
    if radius < 1:
        raise ValueError(f"radius: {radius}; use 1 or more")
    if mask is not None and (mask.shape != (q.shape[0], q.shape[2]) or mask.dtype != torch.bool):
        raise ValueError(f"mask: {tuple(mask.shape)} of {mask.dtype}; use bool ({q.shape[0]}, {q.shape[2]})")
    if implementation == "auto":
        implementation = "windows" if q.is_cuda else "reference"
    implementations = _CAUSAL_IMPLEMENTATIONS if causal else _IMPLEMENTATIONS
    if implementation not in implementations:
        raise ValueError(f"implementation: {implementation!r}; use auto, {' or '.join(implementations)}")
    return implementations[implementation](q, k, v, radius=radius, mask=mask)
