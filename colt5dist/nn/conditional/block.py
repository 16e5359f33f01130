"""The seed's transformer block: conditional attention, then the conditional feed-forward, each with its residual."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from colt5dist.nn.conditional.attention import ConditionalRoutedAttention
from colt5dist.nn.conditional.feed_forward import ConditionalRoutedFeedForward
from colt5dist.nn.routing.router_kwargs import NO_KWARGS


class ConditionalRoutedTransformerBlock(nn.Module):
    """x (b, n, dim) -> x + attention(x), then + feed-forward of that.

    num_heavy_attn_tokens_q, num_heavy_attn_tokens_kv, num_heavy_ff_tokens: tokens that the heavy branches of attention
    and of the feed-forward see. The other arguments are those of `ConditionalRoutedAttention` and
    `ConditionalRoutedFeedForward`; router_straight_through, router_kwargs and use_triton are of all routers.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heavy_attn_tokens_q: int,
        num_heavy_attn_tokens_kv: int,
        num_routed_kv: int = 1,
        num_heavy_ff_tokens: int,
        light_dim_head: int = 64,
        light_heads: int = 8,
        light_window_size: int = 128,
        heavy_dim_head: int = 64,
        heavy_heads: int = 8,
        light_ff_mult: float = 0.5,
        heavy_ff_mult: float = 4,
        router_straight_through: bool = True,
        router_kwargs: Mapping[str, Any] = NO_KWARGS,
        multiply_keys_by_score: bool = False,
        multiply_queries_by_score: bool = False,
        use_triton: bool = False,
        use_null_q_tokens: bool = True,
        use_flash_attn: bool = False,
    ) -> None:
        super().__init__()
        router: dict[str, Any] = {
            "router_straight_through": router_straight_through,
            "router_kwargs": router_kwargs,
            "use_triton": use_triton,
        }
        self.conditional_attn = ConditionalRoutedAttention(
            dim,
            num_heavy_tokens_q=num_heavy_attn_tokens_q,
            num_heavy_tokens_kv=num_heavy_attn_tokens_kv,
            num_routed_kv=num_routed_kv,
            light_dim_head=light_dim_head,
            light_heads=light_heads,
            light_window_size=light_window_size,
            heavy_dim_head=heavy_dim_head,
            heavy_heads=heavy_heads,
            multiply_keys_by_score=multiply_keys_by_score,
            multiply_queries_by_score=multiply_queries_by_score,
            use_null_q_tokens=use_null_q_tokens,
            use_flash_attn=use_flash_attn,
            **router,
        )
        self.conditional_ff = ConditionalRoutedFeedForward(
            dim,
            num_heavy_tokens=num_heavy_ff_tokens,
            light_ff_mult=light_ff_mult,
            heavy_ff_mult=heavy_ff_mult,
            **router,
        )

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        num_heavy_attn_tokens_q: int | None = None,
        num_heavy_attn_tokens_kv: int | None = None,
        num_heavy_ff_tokens: int | None = None,
    ) -> Tensor:
        """x (b, n, dim), mask (b, n) bool, True = valid -> (b, n, dim); budgets in place of the constructor's."""
        x = x + self.conditional_attn(
            x, mask=mask, num_heavy_tokens_q=num_heavy_attn_tokens_q, num_heavy_tokens_kv=num_heavy_attn_tokens_kv
        )
        return x + self.conditional_ff(x, mask, num_heavy_ff_tokens)
