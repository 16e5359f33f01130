"""A decoder's block: causal conditional attention, then the conditional feed-forward under the same admission rule."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from colt5dist.nn.conditional.autoregressive_attention import ConditionalRoutedAutoregressiveAttention
from colt5dist.nn.conditional.feed_forward import ConditionalRoutedFeedForward
from colt5dist.nn.routing.router import Route
from colt5dist.nn.routing.router_kwargs import NO_KWARGS


class ConditionalRoutedAutoregressiveBlock(nn.Module):
    """x (b, n, dim) -> x + attention(x), then + feed-forward of that; no output depends on a later token by one bit.

    num_heavy_attn_tokens_q, num_heavy_ff_tokens: tokens of a window that the heavy branches take as queries and in the
    feed-forward; num_heavy_attn_tokens_kv: keys/values that a window sees. The windows of both are of heavy_window_size
    tokens (None: light_window_size). router_straight_through, router_kwargs and use_triton are of all routers,
    attention_kwargs and ff_kwargs are further arguments of `ConditionalRoutedAutoregressiveAttention` and
    `ConditionalRoutedFeedForward`, the others theirs by name.
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
        heavy_window_size: int | None = None,
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
        attention_kwargs: Mapping[str, Any] = NO_KWARGS,
        ff_kwargs: Mapping[str, Any] = NO_KWARGS,
    ) -> None:
        super().__init__()
        router: dict[str, Any] = {"router_straight_through": router_straight_through, "use_triton": use_triton}
        # random routing draws from a stream of its own for each route
        stream = router_kwargs.get("random_stream", 0)
        self.conditional_attn = ConditionalRoutedAutoregressiveAttention(
            dim,
            num_heavy_tokens_q=num_heavy_attn_tokens_q,
            num_heavy_tokens_kv=num_heavy_attn_tokens_kv,
            num_routed_kv=num_routed_kv,
            light_dim_head=light_dim_head,
            light_heads=light_heads,
            light_window_size=light_window_size,
            heavy_window_size=heavy_window_size,
            heavy_dim_head=heavy_dim_head,
            heavy_heads=heavy_heads,
            multiply_keys_by_score=multiply_keys_by_score,
            multiply_queries_by_score=multiply_queries_by_score,
            use_null_q_tokens=use_null_q_tokens,
            use_flash_attn=use_flash_attn,
            router_kwargs=router_kwargs,
            **router,
            **attention_kwargs,
        )
        self.conditional_ff = ConditionalRoutedFeedForward(
            dim,
            num_heavy_tokens=num_heavy_ff_tokens,
            light_ff_mult=light_ff_mult,
            heavy_ff_mult=heavy_ff_mult,
            routing="causal",
            window_size=self.conditional_attn.heavy_window_size,
            router_kwargs=dict(router_kwargs) | {"random_stream": stream + 1 + num_routed_kv},
            **router,
            **ff_kwargs,
        )

    def forward(
        self,
        x: Tensor,
        num_heavy_attn_tokens_q: int | None = None,
        num_heavy_attn_tokens_kv: int | None = None,
        num_heavy_ff_tokens: int | None = None,
        *,
        sample_index: Tensor | None = None,
        rotary_angles: Tensor | None = None,
        return_route: bool = False,
    ) -> Tensor | tuple[Tensor, Route, Route, Route]:
        """x (b, n, dim) -> (b, n, dim), with return_route and the routing of the feed-forward, of the queries and of
        the keys/values.

        Budgets in place of the constructor's; sample_index, rotary_angles: as in `ConditionalRoutedAttention`.
        """
        attended, query, key_value = self.conditional_attn(
            x,
            num_heavy_tokens_q=num_heavy_attn_tokens_q,
            num_heavy_tokens_kv=num_heavy_attn_tokens_kv,
            sample_index=sample_index,
            rotary_angles=rotary_angles,
            return_route=True,
        )
        x = x + attended
        fed, feed_forward = self.conditional_ff(
            x, None, num_heavy_ff_tokens, sample_index=sample_index, return_route=True
        )
        x = x + fed
        return (x, feed_forward, query, key_value) if return_route else x
