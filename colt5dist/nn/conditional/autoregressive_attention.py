"""Conditional attention for decoders: light causal attention, heavy attention to tokens of earlier windows."""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from colt5dist.nn.attention.local import LocalSelfAttention
from colt5dist.nn.attention.memory import MemoryAttention
from colt5dist.nn.attention.rotary import Angles, RotaryEmbedding, angle_dtype, branch_angles, map_angles
from colt5dist.nn.checks import budget, check_tokens
from colt5dist.nn.conditional.heavy_branch import check_sets, put_back
from colt5dist.nn.norm import RMSNorm
from colt5dist.nn.routing.causal_router import Admission, CausalRouter
from colt5dist.nn.routing.gather_scatter import add_routed, gather_positions, gather_tokens
from colt5dist.nn.routing.router import Route
from colt5dist.nn.routing.router_kwargs import NO_KWARGS, router_arguments
from colt5dist.ops.checks import check_counts, check_optional_counts, check_optional_not_negative, check_positive

ROUTINGS = ("causal", "window")
MEMORY_WINDOWS = 16
"""By default a window admits num_heavy_tokens_kv / 16 keys/values: a query sees those of about 16 windows."""


class ConditionalRoutedAutoregressiveAttention(nn.Module):
    """Conditional attention for decoders: each window's queries attend to what earlier windows routed.

    x (b, n, dim) -> causal light(x) + scatter(heavy(routed queries, routed keys/values of earlier windows) * score),
    without the residual. The sequence is cut into windows of heavy_window_size tokens, the last one of any length. The
    first window, and a sequence that is no longer than one, has the light branch only. Arguments from num_admitted_kv
    on are not in colt5-attention.

    Args:
        dim: width of a token.
        num_heavy_tokens_q: budget of queries, 1 or more: routed queries of a window.
        num_heavy_tokens_kv: budget of keys/values, 1 or more: routed keys/values that a window sees, for each set.
        num_routed_kv: routed sets of keys/values, each with its own picks and for its own share of the heavy heads;
            divides heavy_heads.
        light_dim_head: width of a head of the light branch.
        light_heads: heads of the light branch.
        light_window_size: tokens of a window of the light branch, which sees its own window, up to the token itself,
            and the window before.
        heavy_window_size: tokens of a window of the heavy branch; None: light_window_size.
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
        routing: "causal": no output depends on a later token by one bit. Queries are admitted in order by a threshold
            that the earlier windows set (`CausalRouter`); keys/values are admitted once, in the same way, except that
            their own window takes part in its threshold, for only later windows read them. A window sees the newest
            num_heavy_tokens_kv that were admitted before it. "window": as in colt5-attention. Each window routes its
            own best queries, and the best keys/values of all earlier windows: whether a token is a query depends on
            later tokens of its window, and every window holds a row of scores and num_heavy_tokens_kv tokens of its
            own.
        num_admitted_kv: keys/values of a window that reach the threshold in the mean; no window admits more than twice
            as many. None: num_heavy_tokens_kv / 16, rounded up.
        light_rotary_emb: whether the light branch has rotary positions.
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
        light_dim_head: int = 64,
        light_heads: int = 8,
        light_window_size: int = 128,
        heavy_window_size: int | None = None,
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
        routing: str = "causal",
        num_admitted_kv: int | None = None,
        light_rotary_emb: bool = False,
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
            light_window_size=light_window_size,
            heavy_dim_head=heavy_dim_head,
            heavy_heads=heavy_heads,
        )
        check_optional_counts(heavy_window_size=heavy_window_size, num_admitted_kv=num_admitted_kv)
        check_positive(rope_theta=rope_theta)
        check_optional_not_negative(norm_eps=norm_eps, std=std, output_std=output_std)
        check_sets("num_routed_kv", num_routed_kv, heavy_heads)
        if routing not in ROUTINGS:
            raise ValueError(f"routing: {routing!r}; use one of {', '.join(ROUTINGS)}")
        self.dim = dim
        self.num_heavy_tokens_q = num_heavy_tokens_q
        self.num_heavy_tokens_kv = num_heavy_tokens_kv
        self.num_admitted_kv = num_admitted_kv
        self.heavy_window_size = light_window_size if heavy_window_size is None else heavy_window_size
        self.multiply_queries_by_score = multiply_queries_by_score
        self.routing = routing

        self.norm = RMSNorm(dim, eps=norm_eps) if shared_norm else nn.Identity()
        self.router = CausalRouter(
            dim,
            window_size=self.heavy_window_size,
            num_routing_tokens=1 + num_routed_kv,
            route_groups=(1, num_routed_kv),
            **router_arguments(router_kwargs, straight_through=router_straight_through, use_triton=use_triton),
        )
        self.light_attn = LocalSelfAttention(
            dim,
            dim_head=light_dim_head,
            heads=light_heads,
            radius=light_window_size,
            causal=True,
            prenorm=not shared_norm,
            std=std,
            output_std=output_std,
        )
        self.heavy_attn = MemoryAttention(
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
        self.light_rotary_emb = RotaryEmbedding(light_dim_head, rope_theta) if light_rotary_emb else None

    def forward(
        self,
        x: Tensor,
        *,
        num_heavy_tokens_q: int | None = None,
        num_heavy_tokens_kv: int | None = None,
        random_route: bool = False,
        sample_index: Tensor | None = None,
        rotary_angles: Angles | None = None,
        return_route: bool = False,
    ) -> Tensor | tuple[Tensor, Route, Route]:
        """Attend.

        Args:
            x: (b, n, dim), any n; padding at the end, where no other token sees it.
            num_heavy_tokens_q: budget in place of the constructor's.
            num_heavy_tokens_kv: budget in place of the constructor's.
            random_route: whether to route at random, with scores 1, as a negative control.
            sample_index: (b,) int64, the samples' numbers, needed for random routing by the constructor.
            rotary_angles: of the n positions, computed once for a stack of layers; None: computed here.
            return_route: whether to return the routing too, with routing="causal" only.

        Returns:
            (b, n, dim); with return_route a tuple of this, the queries' and the keys/values' `Route`.
        """
        check_tokens("x", x, self.dim)
        budget_q = budget("num_heavy_tokens_q", num_heavy_tokens_q, self.num_heavy_tokens_q)
        budget_kv = budget("num_heavy_tokens_kv", num_heavy_tokens_kv, self.num_heavy_tokens_kv)
        x = self.norm(x)
        light = self.light_attn(x, rotary_angles=branch_angles(self.light_rotary_emb, x, rotary_angles))
        angles = branch_angles(self.rotary_emb, x, rotary_angles)
        if self.routing == "window" and x.shape[1] > self.heavy_window_size:
            if return_route:
                raise ValueError("return_route: windows route rows of their own; use routing='causal', or False")
            return light + self._by_window(x, (budget_q, budget_kv), random_route)
        query, key_value = self.router.admit(
            x, self.admissions(budget_q, budget_kv), random_route=random_route, sample_index=sample_index
        )
        out = self._by_admission(x, light, query, key_value, budget_kv, angles)
        return (out, query, key_value) if return_route else out

    def admissions(self, budget_q: int, budget_kv: int) -> tuple[Admission, Admission]:
        """How queries and keys/values are admitted under these budgets."""
        width = self.heavy_window_size
        kept = math.ceil(budget_kv / MEMORY_WINDOWS) if self.num_admitted_kv is None else self.num_admitted_kv
        places = width if kept >= width else min(2 * kept, budget_kv, width)
        return self.router.at_once(budget_q), Admission(kept, places, after_window=True)

    def _by_admission(
        self, x: Tensor, light: Tensor, query: Route, key_value: Route, memory_size: int, angles: Angles | None
    ) -> Tensor:
        """light (b, n, dim) with the heavy branch of what was admitted added."""
        assert query.indices is not None and query.mask is not None and key_value.indices is not None
        num_windows = -(-x.shape[1] // self.heavy_window_size) - 1
        indices_q, indices_kv, scores_q = query.indices.squeeze(1), key_value.indices, query.scores.squeeze(1)
        rotary = None
        if angles is not None:
            rotary = (
                map_angles(lambda a: gather_positions(a, indices_q), angles),
                map_angles(lambda a: gather_positions(a, indices_kv), angles),
            )
        tokens_q, tokens_kv = gather_tokens(x, indices_q), gather_tokens(x, indices_kv)
        weights: dict[str, Any] = {
            "normalized_scores_kv": key_value.scores,
            "normalized_scores_q": scores_q if self.multiply_queries_by_score else None,
            "rotary_emb": rotary,
        }
        if num_windows:
            heavy = self.heavy_attn(
                tokens_q, tokens_kv, key_value.mask, num_windows=num_windows, memory_size=memory_size, **weights
            )
        else:
            # a free place, whose score is 0: every parameter has a gradient whatever the length, as ZeRO-3 needs
            heavy = self.heavy_attn(tokens_q, tokens_kv, **weights)
        heavy = heavy * scores_q.to(heavy.dtype).unsqueeze(-1)
        if self.null_q_token is not None:
            # a free place is no query either
            heavy = torch.where(query.mask.squeeze(1).unsqueeze(-1), heavy, self.null_q_token.to(heavy.dtype))
        out = add_routed(light, heavy, indices_q, fill=self.null_q_token)
        width = self.heavy_window_size
        return out if self.null_q_token is None else torch.cat((light[:, :width], out[:, width:]), dim=1)

    def _by_window(self, x: Tensor, budgets: tuple[int, int], random_route: bool) -> Tensor:
        """The heavy branch (b, n, dim) as in colt5-attention: a row of tokens for each window but the first."""
        batch, length = x.shape[:2]
        width = self.heavy_window_size
        x = F.pad(x, (0, 0, 0, -length % width))
        windows = x.shape[1] // width
        mask = (torch.arange(x.shape[1], device=x.device) < length).expand(batch, -1)
        query, key_value = self.router.route_windows(x, budgets, mask=mask, random_route=random_route)
        rows = rearrange(x[:, width:], "b (v w) d -> (b v) w d", w=width)
        tokens_q = rows if query.indices is None else gather_tokens(rows, query.indices.squeeze(1))
        scores_kv, kv_mask = key_value.scores, key_value.mask
        assert kv_mask is not None
        if key_value.indices is None:
            # no more tokens than the budget
            context = repeat(x, "b n d -> (b v) n d", v=windows - 1)
            scores_kv, kv_mask = scores_kv[:, 0], kv_mask[:, 0]
        else:
            context = gather_tokens(x, rearrange(key_value.indices, "(b v) r m -> b (v r) m", v=windows - 1))
            context = rearrange(context, "b (v r) m d -> (b v) r m d", v=windows - 1)
        rotary = None
        if self.rotary_emb is not None:
            angles = self.rotary_emb(x.shape[1], device=x.device, dtype=angle_dtype(x))
            of_rows = repeat(angles[width:], "(v w) d -> (b v) w d", w=width, b=batch)
            rotary = (
                of_rows if query.indices is None else gather_tokens(of_rows, query.indices.squeeze(1)),
                angles if key_value.indices is None else gather_positions(angles, key_value.indices),
            )
        scores_q = query.scores.squeeze(1)
        heavy = self.heavy_attn(
            tokens_q,
            context=context,
            mask=kv_mask,
            normalized_scores_kv=scores_kv,
            normalized_scores_q=scores_q if self.multiply_queries_by_score else None,
            rotary_emb=rotary,
        )
        heavy = put_back(rows, heavy * scores_q.to(heavy.dtype).unsqueeze(-1), query, null_token=self.null_q_token)
        heavy = rearrange(heavy, "(b v) w d -> b (v w) d", v=windows - 1)[:, : length - width]
        return F.pad(heavy, (0, 0, width, 0))
