"""Conditional cross-attention: the routed queries attend to the routed part of a context that may be very long."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from colt5dist.nn.attention.attention import Attention
from colt5dist.nn.checks import budget, check_device, check_mask, check_tokens
from colt5dist.nn.conditional.heavy_branch import attend_routed, check_sets, put_back
from colt5dist.nn.routing.router import CoordinateDescentRouter
from colt5dist.nn.routing.router_kwargs import NO_KWARGS, router_arguments
from colt5dist.ops.checks import check_counts, check_optional_counts


class ConditionalRoutedCrossAttention(nn.Module):
    """Conditional cross-attention: routed tokens attend to the routed tokens of a context.

    x (b, n, dim), context (b, j, dim) -> scatter(attention(routed x, routed context) * score) (b, n, dim), without the
    residual. There is no light branch. x or a context no longer than its budget is taken whole.

    Args:
        dim: width of a token of x and of the context.
        num_tokens_q: budget of queries, 1 or more: how many tokens of x are routed.
        num_tokens_kv: budget of keys/values, 1 or more: how many tokens of the context are routed, for each set.
        num_sets_kv: routed sets of the context, each with its own picks and for its own share of the heads; divides
            heads.
        dim_head: width of an attention head.
        heads: attention heads.
        router_straight_through: whether routing scores are exactly 1 in the forward pass and carry the gradient of the
            soft scores; False: the soft scores multiply.
        router_kwargs: further arguments of the routers (`CoordinateDescentRouter`), for instance {"eps": 1.0,
            "n_iters": 50}.
        kv_routing_tokens: another name for num_sets_kv: give one of the two.
        multiply_keys_by_score: whether the routing scores multiply the keys as well as the values.
        use_triton: whether the routers use the Triton kernels wherever the tokens are; False leaves the choice to the
            router: Triton on CUDA.
        use_null_q_tokens: whether tokens of x that are not routed get a learned output, instead of 0.
        use_flash_attn: changes nothing: PyTorch's fused kernels serve wherever the shapes allow. Kept from the
            signature of colt5-attention.
        route_block_size: the context is cut into whole blocks of so many tokens, and equally many are routed from each;
            None: that of router_kwargs, if there is one, else from the whole context.

    Raises:
        TypeError: an argument has the wrong type, such as a string for a number.
        ValueError: an argument has a wrong value; the message names it and says what to use.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_tokens_q: int,
        num_tokens_kv: int,
        num_sets_kv: int = 1,
        dim_head: int = 64,
        heads: int = 8,
        router_straight_through: bool = True,
        router_kwargs: Mapping[str, Any] = NO_KWARGS,
        kv_routing_tokens: int = 1,
        multiply_keys_by_score: bool = False,
        use_triton: bool = False,
        use_null_q_tokens: bool = True,
        use_flash_attn: bool = False,
        route_block_size: int | None = None,
    ) -> None:
        super().__init__()
        check_counts(dim=dim, num_tokens_q=num_tokens_q, num_tokens_kv=num_tokens_kv, dim_head=dim_head, heads=heads)
        check_counts(num_sets_kv=num_sets_kv, kv_routing_tokens=kv_routing_tokens)
        check_optional_counts(route_block_size=route_block_size)
        if 1 not in (num_sets_kv, kv_routing_tokens) and num_sets_kv != kv_routing_tokens:
            raise ValueError(
                f"num_sets_kv: {num_sets_kv}, but kv_routing_tokens {kv_routing_tokens} is the same number; give one"
            )
        num_sets = kv_routing_tokens if num_sets_kv == 1 else num_sets_kv
        check_sets("num_sets_kv", num_sets, heads)
        self.dim = dim
        self.num_tokens_q = num_tokens_q
        self.num_tokens_kv = num_tokens_kv
        router = router_arguments(router_kwargs, straight_through=router_straight_through, use_triton=use_triton)
        self.null_q_token = nn.Parameter(torch.randn(dim)) if use_null_q_tokens else None
        self.q_router = CoordinateDescentRouter(dim, **router)
        self.kv_router = CoordinateDescentRouter(
            dim,
            num_routing_tokens=num_sets,
            # router_kwargs may hold a block size for the queries' router, and for this one if it has none of its own
            **router | ({} if route_block_size is None else {"route_block_size": route_block_size}),
        )
        self.heavy_attn = Attention(dim, dim_head=dim_head, heads=heads, multiply_keys_by_score=multiply_keys_by_score)

    def forward(
        self,
        x: Tensor,
        context: Tensor,
        *,
        num_tokens_q: int | None = None,
        num_tokens_kv: int | None = None,
        mask: Tensor | None = None,
        context_mask: Tensor | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            x: (b, n, dim).
            context: (b, j, dim).
            num_tokens_q: budget in place of the constructor's.
            num_tokens_kv: budget in place of the constructor's.
            mask: (b, n) bool, True = valid; None: all.
            context_mask: (b, j) bool, True = valid; None: all.

        Returns:
            (b, n, dim).
        """
        check_tokens("x", x, self.dim)
        check_tokens("context", context, self.dim)
        check_device("context", context, x)
        if context.shape[0] != x.shape[0]:
            raise ValueError(f"context: a batch of {context.shape[0]}; use {x.shape[0]}, as x has it")
        check_mask("mask", mask, x.shape[:2], x)
        check_mask("context_mask", context_mask, context.shape[:2], context, "context")
        budget_q = budget("num_tokens_q", num_tokens_q, self.num_tokens_q)
        budget_kv = budget("num_tokens_kv", num_tokens_kv, self.num_tokens_kv)
        query = self.q_router.route(x, budgets=(budget_q,), mask=mask)[0]
        key_value = self.kv_router.route(context, budgets=(budget_kv,), mask=context_mask)[0]
        heavy = attend_routed(self.heavy_attn, x, context, query, key_value)
        return put_back(x, heavy, query, null_token=self.null_q_token)
