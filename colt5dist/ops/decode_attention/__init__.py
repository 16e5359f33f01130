"""Attention of one new token of each sequence: to the tokens decoded so far, and to a context that does not change.

Both read every key and value once, which is all that a step of decoding costs on a GPU. All shapes are fixed, and how
far the decoding is stands in a tensor, so a step can be recorded once as a CUDA graph and replayed for every token.
"""

import torch
from torch import Tensor

from colt5dist.ops.decode_attention.reference import attend_to_context_reference, attend_to_past_reference
from colt5dist.ops.implementation import HAS_TRITON, choose_implementation

if HAS_TRITON:
    from colt5dist.ops.decode_attention.triton import attend_to_context_triton, attend_to_past_triton

__all__ = ["IMPLEMENTATIONS", "attend_to_context", "attend_to_past"]

IMPLEMENTATIONS = ("auto", "reference", "triton")


def _uses_triton(implementation: str, tensor: Tensor) -> bool:
    """float64 is left to the reference."""
    chosen = choose_implementation(implementation, tensor, plain="reference")
    return chosen == "triton" and tensor.dtype != torch.float64


def attend_to_past(
    qkv: Tensor,
    keys: Tensor,
    values: Tensor,
    source: Tensor,
    cosine: Tensor,
    sine: Tensor,
    position: Tensor,
    *,
    implementation: str = "auto",
) -> Tensor:
    """Causal self-attention of the token at `position` of each sequence, with rotary positions.

    The token's own rotated key and its value are written to the cache at [row, position]. Slot j < position of a row is
    read from row source[row, j] of the cache: a beam that goes on from another beam needs a new row of `source`, and no
    copy of keys and values.

    Args:
        qkv: (rows, 3 * heads * dim), queries, keys and values of the new token, not yet rotated.
        keys: (rows, slots, heads, dim), contiguous; changed here.
        values: the same.
        source: (rows, slots) int64.
        cosine: (slots, dim / 2), of the type of qkv; the halves of dim are paired.
        sine: the same.
        position: (1,) int64, tokens before this one, below slots.
        implementation: "reference" (PyTorch), "triton" (CUDA tensors; CPU tensors under TRITON_INTERPRET=1; float64 is
            left to the reference), or "auto": triton for CUDA tensors.

    Returns:
        (rows, heads * dim).
    """
    if _uses_triton(implementation, qkv):
        return attend_to_past_triton(qkv, keys, values, source, cosine, sine, position)
    return attend_to_past_reference(qkv, keys, values, source, cosine, sine, position)


def attend_to_context(q: Tensor, context: Tensor, lengths: Tensor, *, implementation: str = "auto") -> Tensor:
    """Attention of some queries to one head of keys and values, all of one context: multi-query cross-attention.

    The Triton form cuts the context into parts that are read at the same time, because so few queries alone would leave
    most of a GPU idle.

    Args:
        q: (b, m, dim): all heads of all sequences that share a context are its queries.
        context: (b, n, 2 * dim), keys, then values.
        lengths: (b,) int64, 1 to n: the first so many keys are valid.
        implementation: as for `attend_to_past`.

    Returns:
        (b, m, dim).
    """
    if _uses_triton(implementation, q):
        return attend_to_context_triton(q, context, lengths)
    return attend_to_context_reference(q, context, lengths)
