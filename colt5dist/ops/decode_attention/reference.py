"""Attention of one new token, in plain PyTorch."""

import torch
import torch.nn.functional as F
from torch import Tensor


def attend_to_past_reference(
    qkv: Tensor, keys: Tensor, values: Tensor, source: Tensor, cosine: Tensor, sine: Tensor, position: Tensor
) -> Tensor:
    """As `attend_to_past`."""
    rows, slots, heads, dim = keys.shape
    q, k, v = qkv.view(rows, 3, heads, dim).unbind(1)
    cosine, sine = cosine.index_select(0, position), sine.index_select(0, position)
    keys.index_copy_(1, position, _rotate(k, cosine, sine).unsqueeze(1))
    values.index_copy_(1, position, v.unsqueeze(1))
    slot = torch.arange(slots, device=keys.device)
    row = torch.arange(rows, device=keys.device).unsqueeze(1)
    origin = torch.where(slot < position, source, row)
    seen_keys, seen_values = (cache[origin, slot].transpose(1, 2) for cache in (keys, values))
    q = _rotate(q, cosine, sine).unsqueeze(2)
    seen = (slot <= position).unsqueeze(0)
    return F.scaled_dot_product_attention(q, seen_keys, seen_values, attn_mask=seen).reshape(rows, -1)


def _rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1)


def attend_to_context_reference(q: Tensor, context: Tensor, lengths: Tensor) -> Tensor:
    """As `attend_to_context`."""
    k, v = context.unsqueeze(1).chunk(2, dim=-1)
    valid = torch.arange(context.shape[1], device=context.device) < lengths.unsqueeze(1)
    return F.scaled_dot_product_attention(q.unsqueeze(1), k, v, attn_mask=valid[:, None, None]).squeeze(1)
