"""Softmax attention in which some keys are masked, at the speed of attention without a mask.

A mask keeps PyTorch from its fastest kernels, or makes them take half as long again. `centred_keys` needs none. Softmax
does not change when one vector is subtracted from all keys of a row, so let it be the mean of the valid keys; then the
masked keys and their values are set to 0. Let Z be the sum of exp(s_j) over the valid keys j. Attention to all keys
gives, for a query, with p masked keys,

    out' = sum over valid j of exp(s_j) v_j / (Z + p)        log Z' = log(Z + p)

as a masked key has score 0 and value 0. So with w = p exp(-log Z'), the share of the masked keys,

    out = out' / (1 - w)        log Z = log Z' + log(1 - w)

The mean of the valid scores is 0, thus Z >= the number of valid keys (Jensen), and w is at most the share of keys that
are masked, whatever the scores. So an error of log Z' grows at most by (masked keys / valid keys): in float32, about
1e-6, it is far below the rounding of 16 bits but for rows of which less than a thousandth is valid.

The backward pass of attention, given out and log Z in place of out' and log Z', computes the gradients of the masked
attention: a masked key adds nothing to the gradients of the queries, as it is 0, and its own are dropped.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from colt5dist.ops.masked_attention.centred_keys import attention_with_zero_keys, obstacle_to_centred_keys

__all__ = ["IMPLEMENTATIONS", "masked_attention"]

IMPLEMENTATIONS = ("auto", "reference", "centred_keys")


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, *, implementation: str = "auto") -> Tensor:
    """softmax(q k^T / sqrt(dim)) v over the valid keys.

    Args:
        q: (b, h, i, dim).
        k: (b, h, j, dim).
        v: (b, h, j, dim).
        mask: (b, 1, j) or (b, h, j) bool, True = valid key; or (b, 1, i, j) or (b, h, i, j), query by query.
        implementation: "reference" (PyTorch's kernels with the mask), "centred_keys" (its kernels without one: on CUDA
            16-bit, heads of up to 128 and a multiple of 8, two queries and keys or more; on CPUs float32 and
            float64; no mask query by query), or
            "auto": centred_keys for CUDA tensors that it takes, unless PyTorch is to be deterministic, else the
            reference.

    Returns:
        (b, h, i, dim). A masked key has weight exactly 0. Where a row of the mask has no valid key the output is
        exactly 0, and so are its gradients.

    Raises:
        ValueError: the shapes or types do not fit, or the implementation cannot serve.
    """
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape or (*k.shape[:2], k.shape[3]) != (*q.shape[:2], q.shape[3]):
        raise ValueError(
            f"q, k, v: {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}; use (b, h, i, dim), (b, h, j, dim) twice"
        )
    (b, h, i), j = q.shape[:3], k.shape[2]
    if mask.dtype != torch.bool or mask.shape not in ((b, 1, j), (b, h, j), (b, 1, i, j), (b, h, i, j)):
        raise ValueError(
            f"mask: {tuple(mask.shape)} of {mask.dtype}; use bool {(b, 1, j)}, {(b, h, j)}, {(b, 1, i, j)} or "
            f"{(b, h, i, j)}"
        )
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation: {implementation!r}; use one of {', '.join(IMPLEMENTATIONS)}")
    obstacle = "takes no mask query by query" if mask.dim() == 4 else obstacle_to_centred_keys(q, k)
    if implementation == "auto":
        fast = q.is_cuda and obstacle is None and not torch.are_deterministic_algorithms_enabled()
        implementation = "centred_keys" if fast else "reference"
    if implementation == "reference":
        return _reference(q, k, v, mask)
    if obstacle is not None:
        raise ValueError(f"implementation: 'centred_keys' {obstacle}; use 'reference'")
    return _with_centred_keys(q, k, v, mask)


def _reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    mask = mask.unsqueeze(2) if mask.dim() == 3 else mask
    has_key = mask.any(dim=-1, keepdim=True)
    # a row without any valid key attends to all of them, for softmax over nothing is NaN in some kernels, and is then
    # erased
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask | ~has_key)
    return out.masked_fill(~has_key, 0.0)


def _with_centred_keys(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    masked = ~mask.unsqueeze(-1)
    num_valid = mask.sum(dim=-1)
    high = torch.promote_types(k.dtype, torch.float32)
    total = k.masked_fill(masked, 0.0).sum(dim=-2, keepdim=True, dtype=high)
    # no gradient by way of the mean: that of the output with respect to it is 0
    mean = (total / num_valid.clamp(min=1)[..., None, None]).detach()
    k = (k - mean).to(k.dtype).masked_fill(masked, 0.0)
    v = v.masked_fill(masked, 0.0)
    return attention_with_zero_keys(q, k, v, (mask.shape[-1] - num_valid).to(high))
