"""Conditional attention: a light local branch for every token, a heavy branch among the routed ones."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from colt5dist.nn.attention.attention import Attention
from colt5dist.nn.attention.local import LocalSelfAttention
from colt5dist.nn.attention.rotary import Angles, RotaryEmbedding, branch_angles
from colt5dist.nn.checks import budget, check_mask, check_tokens
from colt5dist.nn.conditional.heavy_branch import attend_routed, check_sets, put_back
from colt5dist.nn.dropout import Dropout, drop
from colt5dist.nn.norm import RMSNorm, norm_branch
from colt5dist.nn.routing.router import CoordinateDescentRouter, Route
from colt5dist.nn.routing.router_kwargs import NO_KWARGS, router_arguments
from colt5dist.ops.checks import check_counts, check_optional_counts, check_optional_not_negative, check_positive


class ConditionalRoutedAttention(nn.Module):
    """Conditional attention: local attention for all tokens, heavy attention among the routed ones.

    x (b, n, dim) -> light(x, x) + scatter(heavy(routed queries, routed keys/values) * score), without the residual
    (CoLT5, arXiv 2303.09752, section 3.3). Arguments from light_radius on are not in colt5-attention.

    Args:
        dim: width of a token.
        num_heavy_tokens_q: budget of queries, 1 or more: how many tokens the heavy branch takes as queries.
        num_heavy_tokens_kv: budget of keys/values, 1 or more: how many tokens the heavy branch takes as keys/values,
            for each set.
        num_routed_kv: routed sets of keys/values, each with its own picks and for its own share of the heavy heads;
            divides heavy_heads.
        has_light_attn: whether there is a light branch.
        light_dim_head: width of a head of the light branch.
        light_heads: heads of the light branch.
        light_window_size: twice the radius of the light branch: a token attends to the tokens at most light_window_size
            // 2 away. 2 or more.
        heavy_dim_head: width of a head of the heavy branch; even with rotary_emb.
        heavy_heads: heads of the heavy branch.
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
        rotary_emb: whether the heavy branch has rotary positions, those of the tokens in the whole sequence.
        light_radius: radius of the light branch, 1 or more; None: light_window_size // 2.
        light_rotary_emb: whether the light branch has rotary positions.
        light_relative_bias: whether the light branch has T5's learned bias of the distance.
        use_null_kv: whether each heavy head has a learned key and value that is always attended to.
        shared_norm: whether one RMSNorm serves the router and both branches. False: a LayerNorm in the light branch, an
            RMSNorm in the heavy one, and none before the router.
        rope_theta: base of the rotary frequencies.
        norm_eps: added to the mean square in RMSNorm; None: the smallest that is of use, as in colt5-attention.
        std: standard deviation of the initial weights; None: PyTorch's initialisation.
        output_std: the same of the last linear map of each branch.

    Raises:
        TypeError: an argument has the wrong type, such as a string for a number.
        ValueError: an argument has a wrong value; the message names it and says what to use.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heavy_tokens_q: int,
        num_heavy_tokens_kv: int,
        num_routed_kv: int = 1,
        has_light_attn: bool = True,
        light_dim_head: int = 64,
        light_heads: int = 8,
        light_window_size: int = 128,
        heavy_dim_head: int = 64,
        heavy_heads: int = 8,
        router_straight_through: bool = True,
        router_kwargs: Mapping[str, Any] = NO_KWARGS,
        multiply_keys_by_score: bool = False,
        multiply_queries_by_score: bool = False,
        use_triton: bool = False,
        use_null_q_tokens: bool = True,
        use_flash_attn: bool = False,
        rotary_emb: bool = False,
        light_radius: int | None = None,
        light_rotary_emb: bool = False,
        light_relative_bias: bool = False,
        use_null_kv: bool = True,
        shared_norm: bool = False,
        rope_theta: float = 10000,
        norm_eps: float | None = None,
        std: float | None = None,
        output_std: float | None = None,
    ) -> None:
        super().__init__()
        check_counts(
            dim=dim,
            num_heavy_tokens_q=num_heavy_tokens_q,
            num_heavy_tokens_kv=num_heavy_tokens_kv,
            light_dim_head=light_dim_head,
            light_heads=light_heads,
            heavy_dim_head=heavy_dim_head,
            heavy_heads=heavy_heads,
        )
        # without a light branch its sizes are of no account
        smallest = 1 if has_light_attn else 0
        check_counts(at_least=smallest, light_window_size=light_window_size)
        check_optional_counts(at_least=smallest, light_radius=light_radius)
        check_positive(rope_theta=rope_theta)
        check_optional_not_negative(norm_eps=norm_eps, std=std, output_std=output_std)
        check_sets("num_routed_kv", num_routed_kv, heavy_heads)
        if has_light_attn and light_radius is None and light_window_size < 2:
            raise ValueError(f"light_window_size: {light_window_size} is twice the radius; use 2 or more")
        self.dim = dim
        self.num_heavy_tokens_q = num_heavy_tokens_q
        self.num_heavy_tokens_kv = num_heavy_tokens_kv
        self.multiply_queries_by_score = multiply_queries_by_score
        router = router_arguments(router_kwargs, straight_through=router_straight_through, use_triton=use_triton)

        self.norm = RMSNorm(dim, eps=norm_eps) if shared_norm else nn.Identity()
        # one router for queries and keys/values: they read the same x
        self.router = CoordinateDescentRouter(
            dim,
            num_routing_tokens=1 + num_routed_kv,
            route_groups=(1, num_routed_kv),
            **router,
        )
        self.light_attn: LocalSelfAttention | None = None
        if has_light_attn:
            self.light_attn = LocalSelfAttention(
                dim,
                dim_head=light_dim_head,
                heads=light_heads,
                radius=light_window_size // 2 if light_radius is None else light_radius,
                prenorm=not shared_norm,
                relative_bias=light_relative_bias,
                std=std,
                output_std=output_std,
            )
        self.heavy_attn = Attention(
            dim,
            dim_head=heavy_dim_head,
            heads=heavy_heads,
            multiply_keys_by_score=multiply_keys_by_score,
            prenorm=not shared_norm,
            null_kv=use_null_kv,
            norm_eps=norm_eps,
            std=std,
            output_std=output_std,
        )
        self.null_q_token = nn.Parameter(torch.randn(dim)) if use_null_q_tokens else None
        self.rotary_emb = RotaryEmbedding(heavy_dim_head, rope_theta) if rotary_emb else None
        self.light_rotary_emb = (
            RotaryEmbedding(light_dim_head, rope_theta) if light_rotary_emb and has_light_attn else None
        )

    def forward(
        self,
        x: Tensor,
        *,
        num_heavy_tokens_q: int | None = None,
        num_heavy_tokens_kv: int | None = None,
        mask: Tensor | None = None,
        sample_index: Tensor | None = None,
        rotary_angles: Angles | None = None,
        return_route: bool = False,
        residual: bool = False,
        dropout: Dropout | None = None,
    ) -> Tensor | tuple[Tensor, Route, Route]:
        """Attend.

        Args:
            x: (b, n, dim).
            num_heavy_tokens_q: budget in place of the constructor's.
            num_heavy_tokens_kv: budget in place of the constructor's.
            mask: (b, n) bool, True = valid; None: all.
            sample_index: (b,) int64, the samples' numbers, needed for random routing and, in training, for noise.
            rotary_angles: of the n positions, computed once for a stack of layers whose two branches have one head
                dimension; None: computed here, where the layer has rotary positions.
            return_route: whether to return the routing too.
            residual: whether to add x to the result.
            dropout: of what is added to x with residual; None: none.

        Returns:
            (b, n, dim); with return_route a tuple of this, the queries' and the keys/values' `Route`.
        """
        check_tokens("x", x, self.dim)
        check_mask("mask", mask, x.shape[:2], x)
        budget_q = budget("num_heavy_tokens_q", num_heavy_tokens_q, self.num_heavy_tokens_q)
        budget_kv = budget("num_heavy_tokens_kv", num_heavy_tokens_kv, self.num_heavy_tokens_kv)
        residual_input, x = norm_branch(self.norm, x, residual=residual)
        query, key_value = self.router.route(x, budgets=(budget_q, budget_kv), mask=mask, sample_index=sample_index)
        light = None
        if self.light_attn is not None:
            light = self.light_attn(x, mask=mask, rotary_angles=branch_angles(self.light_rotary_emb, x, rotary_angles))
        heavy = attend_routed(
            self.heavy_attn,
            x,
            x,
            query,
            key_value,
            multiply_queries_by_score=self.multiply_queries_by_score,
            angles=branch_angles(self.rotary_emb, x, rotary_angles),
        )
        out = put_back(x, heavy, query, light=light, null_token=self.null_q_token)
        out = residual_input + drop(out, dropout, 0) if residual else out
        return (out, query, key_value) if return_route else out
