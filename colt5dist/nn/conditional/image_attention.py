"""Conditional attention of feature maps: a light branch within patches, a heavy branch among the routed positions."""

from collections.abc import Mapping
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from colt5dist.nn.attention.attention import Attention
from colt5dist.nn.attention.self_attention import SelfAttention
from colt5dist.nn.checks import budget, check_features, check_mask, check_tensor
from colt5dist.nn.conditional.heavy_branch import attend_routed, check_sets, put_back
from colt5dist.nn.routing.router import CoordinateDescentRouter
from colt5dist.nn.routing.router_kwargs import NO_KWARGS, router_arguments
from colt5dist.ops.checks import check_counts

ROUTED_WITHIN = ("map", "patch")


class ConditionalRoutedImageAttention(nn.Module):
    """Conditional attention of feature maps: light within patches, heavy among the routed positions.

    x (b, height, width, dim), or (b, dim, height, width) with channel_first -> the same shape, without the residual.
    The heavy branch attends from routed positions to routed positions.

    Args:
        dim: width of a position, the number of channels.
        num_heavy_tokens_q: budget of queries, 1 or more: how many positions the heavy branch takes as queries.
        num_heavy_tokens_kv: budget of keys/values, 1 or more: how many positions the heavy branch takes as keys/values,
            for each set.
        num_routed_kv: routed sets of keys/values, each with its own picks and for its own share of the heavy heads;
            divides heavy_heads.
        light_dim_head: width of a head of the light branch.
        light_heads: heads of the light branch.
        light_window_size: side of a patch: the light branch is full attention within patches of light_window_size x
            light_window_size positions, into which height and width must divide.
        heavy_dim_head: width of a head of the heavy branch.
        heavy_heads: heads of the heavy branch.
        router_straight_through: whether routing scores are exactly 1 in the forward pass and carry the gradient of the
            soft scores; False: the soft scores multiply.
        router_kwargs: further arguments of the routers (`CoordinateDescentRouter`), for instance {"eps": 1.0,
            "n_iters": 50}.
        multiply_keys_by_score: whether the routing scores multiply the keys as well as the values.
        multiply_queries_by_score: whether the routing scores multiply the queries as well as the heavy output.
        use_triton: whether the routers use the Triton kernels wherever the tokens are; False leaves the choice to the
            router: Triton on CUDA.
        use_null_q_tokens: whether positions that are no heavy query get a learned output of the heavy branch, instead
            of 0.
        use_flash_attn: changes nothing: PyTorch's fused kernels serve wherever the shapes allow. Kept from the
            signature of colt5-attention.
        channel_first: whether the channels come before height and width.
        routing: "map": the budgets are of the whole map. "patch": of each patch, and positions attend within their
            patch, as in colt5-attention.

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
        channel_first: bool = False,
        routing: str = "map",
    ) -> None:
        super().__init__()
        check_counts(
            dim=dim,
            num_heavy_tokens_q=num_heavy_tokens_q,
            num_heavy_tokens_kv=num_heavy_tokens_kv,
            light_dim_head=light_dim_head,
            light_heads=light_heads,
            light_window_size=light_window_size,
            heavy_dim_head=heavy_dim_head,
            heavy_heads=heavy_heads,
        )
        check_sets("num_routed_kv", num_routed_kv, heavy_heads)
        if routing not in ROUTED_WITHIN:
            raise ValueError(f"routing: {routing!r}; use one of {', '.join(ROUTED_WITHIN)}")
        self.dim = dim
        self.num_heavy_tokens_q = num_heavy_tokens_q
        self.num_heavy_tokens_kv = num_heavy_tokens_kv
        self.multiply_queries_by_score = multiply_queries_by_score
        self.light_window_size = light_window_size
        self.channel_first = channel_first
        self.routing = routing
        router = router_arguments(router_kwargs, straight_through=router_straight_through, use_triton=use_triton)
        self.light_attn = SelfAttention(dim, dim_head=light_dim_head, heads=light_heads, prenorm=True)
        self.null_q_token = nn.Parameter(torch.randn(dim)) if use_null_q_tokens else None
        self.router = CoordinateDescentRouter(
            dim,
            num_routing_tokens=1 + num_routed_kv,
            route_groups=(1, num_routed_kv),
            **router,
        )
        self.heavy_attn = Attention(
            dim, dim_head=heavy_dim_head, heads=heavy_heads, multiply_keys_by_score=multiply_keys_by_score
        )

    def forward(
        self,
        x: Tensor,
        *,
        num_heavy_tokens_q: int | None = None,
        num_heavy_tokens_kv: int | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            x: (b, height, width, dim), or (b, dim, height, width) with channel_first.
            num_heavy_tokens_q: budget in place of the constructor's.
            num_heavy_tokens_kv: budget in place of the constructor's.
            mask: (b, height, width) bool, True = valid: masked positions are neither attended to nor routed.

        Returns:
            The shape of x.
        """
        check_tensor("x", x)
        x = x.movedim(1, -1) if self.channel_first and x.dim() == 4 else x
        self._check(x, mask)
        budget_q = budget("num_heavy_tokens_q", num_heavy_tokens_q, self.num_heavy_tokens_q)
        budget_kv = budget("num_heavy_tokens_kv", num_heavy_tokens_kv, self.num_heavy_tokens_kv)
        height, width = x.shape[1:3]
        patches = self._cut(x)
        patch_mask = None if mask is None else self._cut(mask.unsqueeze(-1)).squeeze(-1)
        light = self._join(self.light_attn(patches, mask=patch_mask), height, width)

        within_patches = self.routing == "patch"
        tokens = patches if within_patches else x.flatten(1, 2)
        token_mask = patch_mask if within_patches or mask is None else mask.flatten(1, 2)
        query, key_value = self.router.route(tokens, budgets=(budget_q, budget_kv), mask=token_mask)
        heavy = attend_routed(
            self.heavy_attn,
            tokens,
            tokens,
            query,
            key_value,
            multiply_queries_by_score=self.multiply_queries_by_score,
        )
        if within_patches:
            heavy = put_back(tokens, heavy, query, null_token=self.null_q_token)
            out = light + self._join(heavy, height, width)
        else:
            out = put_back(tokens, heavy, query, light=light.flatten(1, 2), null_token=self.null_q_token)
            out = out.unflatten(1, (height, width))
        return out.movedim(-1, 1) if self.channel_first else out

    def _check(self, x: Tensor, mask: Tensor | None) -> None:
        """Raise for arguments of `forward` that do not fit; x is channel-last."""
        size = self.light_window_size
        if x.dim() != 4 or x.shape[-1] != self.dim:
            channels = "second" if self.channel_first else "last"
            shape = tuple(x.movedim(-1, 1).shape) if self.channel_first and x.dim() == 4 else tuple(x.shape)
            raise ValueError(f"x: {shape}; use a batch of feature maps, 4 dimensions, dim {self.dim} {channels}")
        check_features("x", x, self.dim)
        height, width = x.shape[1:3]
        if height % size or width % size:
            raise ValueError(
                f"x: a map of {height} x {width} is not cut into patches of light_window_size {size}; pad it"
            )
        check_mask("mask", mask, x.shape[:3], x)

    def _cut(self, x: Tensor) -> Tensor:
        """(b, height, width, dim) -> the patches of all samples, (b * patches, positions of a patch, dim)."""
        size = self.light_window_size
        return rearrange(x, "b (h i) (w j) d -> (b h w) (i j) d", i=size, j=size)

    def _join(self, patches: Tensor, height: int, width: int) -> Tensor:
        """The way back from `_cut`."""
        size = self.light_window_size
        sizes = {"h": height // size, "w": width // size, "i": size, "j": size}
        return rearrange(patches, "(b h w) (i j) d -> b (h i) (w j) d", **sizes)
