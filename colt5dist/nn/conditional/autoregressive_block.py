"""A decoder's block: causal conditional attention, then the conditional feed-forward under the same admission rule."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from colt5dist.nn.attention.rotary import Angles
from colt5dist.nn.conditional.autoregressive_attention import ConditionalRoutedAutoregressiveAttention
from colt5dist.nn.conditional.feed_forward import ConditionalRoutedFeedForward
from colt5dist.nn.dropout import Dropout, drop, parts_of
from colt5dist.nn.feed_forward import OUTPUT
from colt5dist.nn.routing.router import Route
from colt5dist.nn.routing.router_kwargs import NO_KWARGS, check_mapping
from colt5dist.ops.checks import check_counts, check_optional_counts


class ConditionalRoutedAutoregressiveBlock(nn.Module):
    """A decoder's block: causal conditional attention, then a conditional feed-forward, with residuals.

    x (b, n, dim) -> x + attention(x), then + feed_forward of that. No output depends on a later token by one bit. The
    block is not in colt5-attention.

    Args:
        dim: width of a token.
        num_heavy_attn_tokens_q: budget of queries, 1 or more: tokens of a window that heavy attention takes as queries.
        num_heavy_attn_tokens_kv: budget of keys/values, 1 or more: the newest routed keys/values of earlier windows
            that a window sees, for each set.
        num_routed_kv: routed sets of keys/values, each with its own picks and for its own share of the heavy heads;
            divides heavy_heads.
        num_heavy_ff_tokens: budget of the feed-forward, 1 or more: tokens of a window that its heavy branch sees.
        light_dim_head: width of a head of the light branch.
        light_heads: heads of the light branch.
        light_window_size: tokens of a window of light attention, which sees its own window, up to the token itself, and
            the window before.
        heavy_window_size: tokens of a window of the heavy branches of both layers; None: light_window_size.
        heavy_dim_head: width of a head of the heavy branch; even with rotary_emb.
        heavy_heads: heads of the heavy branch.
        light_ff_mult: hidden size of the light feed-forward, in multiples of dim.
        heavy_ff_mult: hidden size of the heavy feed-forward, in multiples of dim.
        router_straight_through: whether routing scores are exactly 1 in the forward pass and carry the gradient of the
            soft scores; False: the soft scores multiply.
        router_kwargs: further arguments of all routers (`CoordinateDescentRouter`), for instance {"eps": 1.0,
            "n_iters": 50}. The feed-forward's router draws its random numbers from the streams after those of
            attention.
        multiply_keys_by_score: whether the routing scores multiply the keys as well as the values.
        multiply_queries_by_score: whether the routing scores multiply the queries as well as the heavy output.
        use_triton: whether the routers use the Triton kernels wherever the tokens are; False leaves the choice to the
            router: Triton on CUDA.
        use_null_q_tokens: whether tokens that are no heavy query get a learned output of the heavy branch, instead of
            0.
        use_flash_attn: changes nothing: PyTorch's fused kernels serve wherever the shapes allow. Kept from the
            signature of colt5-attention.
        attention_kwargs: further arguments of `ConditionalRoutedAutoregressiveAttention`, by their names there.
        ff_kwargs: further arguments of `ConditionalRoutedFeedForward`, by their names there.

    Raises:
        TypeError: an argument has the wrong type, such as a string for a number.
        ValueError: an argument has a wrong value; the message names it and says what to use.
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
        check_counts(
            num_heavy_attn_tokens_q=num_heavy_attn_tokens_q,
            num_heavy_attn_tokens_kv=num_heavy_attn_tokens_kv,
            num_heavy_ff_tokens=num_heavy_ff_tokens,
        )
        router: dict[str, Any] = {"router_straight_through": router_straight_through, "use_triton": use_triton}
        check_mapping(router_kwargs=router_kwargs, attention_kwargs=attention_kwargs, ff_kwargs=ff_kwargs)
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
        rotary_angles: Angles | None = None,
        return_route: bool = False,
        dropout: Dropout | None = None,
    ) -> Tensor | tuple[Tensor, Route, Route, Route]:
        """Both layers with their residuals.

        Args:
            x: (b, n, dim), any n; padding at the end, where no other token sees it.
            num_heavy_attn_tokens_q: budget in place of the constructor's.
            num_heavy_attn_tokens_kv: budget in place of the constructor's.
            num_heavy_ff_tokens: budget in place of the constructor's.
            sample_index: (b,) int64, the samples' numbers, needed for random routing.
            rotary_angles: of the n positions, computed once for a stack of layers; None: computed here.
            return_route: whether to return the routing too.
            dropout: of what is added to x, and of the hidden units of the feed-forward; None: none.

        Returns:
            (b, n, dim); with return_route a tuple of this and the `Route` of the feed-forward, of the queries and of
            the keys/values.
        """
        check_optional_counts(
            num_heavy_attn_tokens_q=num_heavy_attn_tokens_q,
            num_heavy_attn_tokens_kv=num_heavy_attn_tokens_kv,
            num_heavy_ff_tokens=num_heavy_ff_tokens,
        )
        in_attention, in_feed_forward = parts_of(dropout, 2)
        attended, query, key_value = self.conditional_attn(
            x,
            num_heavy_tokens_q=num_heavy_attn_tokens_q,
            num_heavy_tokens_kv=num_heavy_attn_tokens_kv,
            sample_index=sample_index,
            rotary_angles=rotary_angles,
            return_route=True,
        )
        x = x + drop(attended, in_attention, 0)
        fed, feed_forward = self.conditional_ff(
            x, None, num_heavy_ff_tokens, sample_index=sample_index, return_route=True, dropout=in_feed_forward
        )
        x = x + drop(fed, in_feed_forward, OUTPUT)
        return (x, feed_forward, query, key_value) if return_route else x
