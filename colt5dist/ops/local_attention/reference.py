"""Local attention by the package `local-attention`: windows of keys around windows of queries."""

import torch
from local_attention import LocalAttention
from torch import Tensor


def _attention_of_radius(radius: int, causal: bool = False) -> LocalAttention:
    return LocalAttention(
        window_size=radius,
        causal=causal,
        look_backward=1,
        look_forward=0 if causal else 1,
        exact_windowsize=not causal,
        autopad=True,
        use_rotary_pos_emb=False,
    )


def local_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, *, radius: int, mask: Tensor | None, bias: Tensor | None
) -> Tensor:
    """Shapes as in `local_attention`; the scores of a window of queries with three windows of keys are held in
    memory."""
    if mask is None:
        # without a mask the package attends to the zeros that it pads the sequence with
        mask = torch.ones((q.shape[0], q.shape[-2]), dtype=torch.bool, device=q.device)
    window_bias = None
    if bias is not None:
        # (heads, window, three windows): the first key lies one window before the first query
        query = torch.arange(radius, device=q.device).unsqueeze(-1)
        key = torch.arange(-radius, 2 * radius, device=q.device)
        window_bias = bias[:, (key - query + radius).clamp(0, 2 * radius)].to(q.dtype)
    return _attention_of_radius(radius)(q, k, v, mask=mask, attn_bias=window_bias)


def local_attention_causal_reference(q: Tensor, k: Tensor, v: Tensor, *, radius: int, mask: Tensor | None) -> Tensor:
    """The causal form; the padding that the package adds stands at the end, where no query sees it."""
    return _attention_of_radius(radius, causal=True)(q, k, v, mask=mask)
