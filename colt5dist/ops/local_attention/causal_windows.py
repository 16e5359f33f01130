"""Causal local attention by PyTorch's fused kernels: windows of queries over their own keys and those before."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor


def local_attention_causal_windows(q: Tensor, k: Tensor, v: Tensor, *, radius: int, mask: Tensor | None) -> Tensor:
    """Shapes as in `local_attention`; keys and values are copied twice, once for each window that sees them."""
    batch, n = q.shape[0], q.shape[2]
    padding = -n % radius

    def windows(x: Tensor) -> Tensor:
        """(batch, heads, n, dim) -> (batch, windows, heads, radius, dim)."""
        return rearrange(F.pad(x, (0, 0, 0, padding)), "b h (v w) d -> b v h w d", w=radius)

    def with_the_one_before(x: Tensor) -> Tensor:
        """(batch, heads, n, dim) -> (batch * windows, heads, 2 * radius, dim)."""
        own = windows(x)
        before = F.pad(own, (0, 0, 0, 0, 0, 0, 1, 0))[:, :-1]
        return torch.cat((before, own), dim=3).flatten(0, 1)

    out = F.scaled_dot_product_attention(
        windows(q).flatten(0, 1),
        with_the_one_before(k),
        with_the_one_before(v),
        attn_mask=_allowed(batch, n, radius, mask, q.device),
    )
    out = rearrange(out, "(b v) h w d -> b h (v w) d", b=batch)
    return out[:, :, :n]


def _allowed(batch: int, n: int, radius: int, mask: Tensor | None, device: torch.device) -> Tensor:
    """(batch * windows, 1, radius, 2 * radius) bool; a query without any valid key is given all of its keys."""
    query = torch.arange(radius, device=device).unsqueeze(-1)
    key = torch.arange(-radius, radius, device=device)
    valid = torch.ones((batch, n), dtype=torch.bool, device=device) if mask is None else mask
    valid = F.pad(valid, (radius, -n % radius)).unfold(1, 2 * radius, radius)
    allowed = (key <= query) & valid.unsqueeze(2)
    return (allowed | ~allowed.any(dim=-1, keepdim=True)).flatten(0, 1).unsqueeze(1)
