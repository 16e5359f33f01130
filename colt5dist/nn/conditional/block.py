"""A transformer block: conditional attention, then the conditional feed-forward, each with its residual."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from colt5dist.nn.conditional.attention import ConditionalRoutedAttention
from colt5dist.nn.conditional.feed_forward import ConditionalRoutedFeedForward
from colt5dist.nn.routing.router_kwargs import NO_KWARGS
from colt5dist.ops.checks import check_counts, check_optional_counts


class ConditionalRoutedTransformerBlock(nn.Module):
    """Conditional attention, then the conditional feed-forward, each with its residual.

    x (b, n, dim) -> x + attention(x), then + feed_forward of that.

    Args:
        dim: width of a token.
        num_heavy_attn_tokens_q: budget of queries, 1 or more: how many tokens heavy attention takes as queries.
        num_heavy_attn_tokens_kv: budget of keys/values, 1 or more: how many tokens heavy attention takes as
            keys/values, for each set.
        num_routed_kv: routed sets of keys/values, each with its own picks and for its own share of the heavy heads;
            divides heavy_heads.
        num_heavy_ff_tokens: budget of the feed-forward, 1 or more: how many tokens its heavy branch sees.
        light_dim_head: width of a head of the light branch.
        light_heads: heads of the light branch.
        light_window_size: twice the radius of the light branch: a token attends to the tokens at most light_window_size
            // 2 away. 2 or more.
        heavy_dim_head: width of a head of the heavy branch.
        heavy_heads: heads of the heavy branch.
        light_ff_mult: hidden size of the light feed-forward, in multiples of dim.
        heavy_ff_mult: hidden size of the heavy feed-forward, in multiples of dim.
        router_straight_through: whether routing scores are exactly 1 in the forward pass and carry the gradient of the
            soft scores; False: the soft scores multiply.
        router_kwargs: further arguments of the routers (`CoordinateDescentRouter`), for instance {"eps": 1.0,
            "n_iters": 50}.
        multiply_keys_by_score: whether the routing scores multiply the keys as well as the values.
        multiply_queries_by_score: whether the routing scores multiply the queries as well as the heavy output.
        use_triton: whether the routers use the Triton kernels wherever the tokens are; False leaves the choice to the
            router: Triton on CUDA.
        use_null_q_tokens: whether tokens that are no heavy query get a learned output of the heavy branch, instead of
            0.
        use_flash_attn: changes nothing: PyTorch's fused kernels serve wherever the shapes allow. Kept from the
            signature of colt5-attention.

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
        check_counts(
            num_heavy_attn_tokens_q=num_heavy_attn_tokens_q,
            num_heavy_attn_tokens_kv=num_heavy_attn_tokens_kv,
            num_heavy_ff_tokens=num_heavy_ff_tokens,
        )
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
        """Both layers with their residuals.

        Args:
            x: (b, n, dim).
            mask: (b, n) bool, True = valid; None: all.
            num_heavy_attn_tokens_q: budget in place of the constructor's.
            num_heavy_attn_tokens_kv: budget in place of the constructor's.
            num_heavy_ff_tokens: budget in place of the constructor's.

        Returns:
            (b, n, dim).
        """
        check_optional_counts(
            num_heavy_attn_tokens_q=num_heavy_attn_tokens_q,
            num_heavy_attn_tokens_kv=num_heavy_attn_tokens_kv,
            num_heavy_ff_tokens=num_heavy_ff_tokens,
        )
        x = x + self.conditional_attn(
            x, mask=mask, num_heavy_tokens_q=num_heavy_attn_tokens_q, num_heavy_tokens_kv=num_heavy_attn_tokens_kv
        )
        return x + self.conditional_ff(x, mask, num_heavy_ff_tokens)
