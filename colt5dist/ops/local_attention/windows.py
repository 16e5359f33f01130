"""Local attention by PyTorch's fused attention kernels, over windows of queries and the keys around them.

The samples are concatenated; queries are views of them, keys and values are copied with the ones around each
window. What a window sees of a neighbouring sample is masked.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

MIN_WINDOW = 64
"""Fewest queries of a window: smaller ones leave most of a matrix instruction idle."""
ALIGNMENT = 16
"""The keys reach over a window's edges by the radius, rounded up to a multiple of this."""


def local_attention_windows(q: Tensor, k: Tensor, v: Tensor, *, radius: int, mask: Tensor | None) -> Tensor:
    """Shapes as in `local_attention`; fastest where q, k and v lie in memory as (batch, n, heads, dim)."""
    batch, _, n, _ = q.shape
    halo = -(-radius // ALIGNMENT) * ALIGNMENT
    window = max(halo, MIN_WINDOW)
    padding = -n % window

    def laid_out(x: Tensor) -> Tensor:
        x = x.transpose(1, 2)
        x = F.pad(x, (0, 0, 0, 0, 0, padding)) if padding else x
        return x.flatten(0, 1)

    def around_windows(x: Tensor) -> Tensor:
        # not by overlapping views (`unfold`): PyTorch's compiler gets their gradient wrong on CPU
        own = rearrange(laid_out(x), "(v w) h d -> v h w d", w=window)
        padded = F.pad(own, (0, 0, 0, 0, 0, 0, 1, 1))
        return torch.cat((padded[:-2, :, window - halo :], own, padded[2:, :, :halo]), dim=2)

    # (batch * windows, heads, window or width, dim)
    queries = rearrange(laid_out(q), "(v w) h d -> v h w d", w=window)
    allowed = _allowed_keys(batch, n, radius, halo, window, mask, q.device)
    out = F.scaled_dot_product_attention(queries, around_windows(k), around_windows(v), attn_mask=allowed)
    return rearrange(out, "(b v) h w d -> b (v w) h d", b=batch)[:, :n].transpose(1, 2)


def _allowed_keys(
    batch: int, n: int, radius: int, halo: int, window: int, mask: Tensor | None, device: torch.device
) -> Tensor:
    """(batch * windows, 1, window, width) bool: valid keys of the window's own sample within the radius.

    A query without any is given all of the window's keys: softmax over nothing is NaN.
    """
    padding = -n % window
    sample = torch.arange(batch, device=device).unsqueeze(-1)
    key_sample = sample.expand(batch, n) if mask is None else torch.where(mask, sample, -1)
    key_sample = F.pad(F.pad(key_sample, (0, padding), value=-1).flatten(), (halo, halo), value=-1)
    key_sample = key_sample.unfold(0, window + 2 * halo, window)
    own_sample = sample.expand(batch, (n + padding) // window).reshape(-1, 1)
    query = torch.arange(window, device=device).unsqueeze(-1)
    key = torch.arange(-halo, window + halo, device=device)
    allowed = ((query - key).abs() <= radius) & (key_sample == own_sample).unsqueeze(1)
    return (allowed | ~allowed.any(dim=-1, keepdim=True)).unsqueeze(1)
