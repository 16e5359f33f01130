"""Attention of routed queries to routed sets of keys and values: the heavy branch of conditional attention."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from colt5dist.nn.attention.attend import attend, merge_heads, split_heads
from colt5dist.nn.attention.rotary import Angles, apply_rotary, map_angles
from colt5dist.nn.checks import check_device, check_features, check_tensor, check_tokens
from colt5dist.nn.linear import Linear
from colt5dist.nn.norm import RMSNorm
from colt5dist.ops.checks import check_counts, check_optional_not_negative


class KeyValueProjection(Linear):
    """Keys and values of r routed sets: the heads are split into r groups, and group g reads set g only.

    (b, r, n, dim) -> (b, heads, n, 2, dim_head), keys before values. The rows of the weight are in the order (head, key
    | value, dim_head).
    """

    def __init__(self, dim: int, *, dim_head: int, heads: int, std: float | None) -> None:
        super().__init__(dim, 2 * dim_head * heads, std=std)
        self.heads = heads
        self.dim_head = dim_head

    def forward(self, input: Tensor) -> Tensor:
        """Project the sets (b, r, n, dim)."""
        r, dim = input.shape[1], input.shape[-1]
        if r == 1:
            both = F.linear(input.squeeze(1), self.weight)
            return rearrange(both, "b n (h two d) -> b h n two d", h=self.heads, two=2)
        weight = self.weight.view(r, self.weight.shape[0] // r, dim)
        both = torch.einsum("brnd,rod->brno", input, weight)
        return rearrange(both, "b r n (h two d) -> b (r h) n two d", two=2, d=self.dim_head)


class Attention(nn.Module):
    """Attention of queries to routed sets of keys and values.

    Queries x (b, i, dim) attend to context (b, n, dim), or (b, r, n, dim): r routed sets, one for each of r groups of
    heads. The values are multiplied by the routing scores of the context. One RMSNorm serves x and context. Without
    bias, a score on keys and values is a score on the normalised context, which is CoLT5's (arXiv 2303.09752, section
    3.3). Arguments from prenorm on are not in colt5-attention.

    Args:
        dim: width of a token.
        dim_head: width of an attention head.
        heads: attention heads.
        multiply_keys_by_score: whether the routing scores multiply the keys as well as the values.
        use_flash: changes nothing: PyTorch's fused kernels serve wherever the shapes allow. Kept from the signature of
            colt5-attention.
        prenorm: whether an RMSNorm comes first; False leaves the norm to the caller.
        null_kv: whether each head has a learned key and value that comes before the context and is always attended to.
        norm_eps: added to the mean square in RMSNorm; None: the smallest that is of use, as in colt5-attention.
        std: standard deviation of the initial weights; None: PyTorch's initialisation.
        output_std: the same of the last linear map.

    Raises:
        TypeError: an argument has the wrong type, such as a string for a number.
        ValueError: an argument has a wrong value; the message names it and says what to use.
    """

    def __init__(
        self,
        dim: int,
        dim_head: int = 64,
        heads: int = 8,
        multiply_keys_by_score: bool = False,
        use_flash: bool = False,
        *,
        prenorm: bool = True,
        null_kv: bool = True,
        norm_eps: float | None = None,
        std: float | None = None,
        output_std: float | None = None,
    ) -> None:
        super().__init__()
        check_counts(dim=dim, dim_head=dim_head, heads=heads)
        check_optional_not_negative(norm_eps=norm_eps, std=std, output_std=output_std)
        self.dim = dim
        self.heads = heads
        self.multiply_keys_by_score = multiply_keys_by_score
        self.norm = RMSNorm(dim, eps=norm_eps) if prenorm else nn.Identity()
        self.null_kv = nn.Parameter(torch.randn(2, heads, dim_head)) if null_kv else None
        self.to_q = Linear(dim, dim_head * heads, std=std)
        self.to_kv = KeyValueProjection(dim, dim_head=dim_head, heads=heads, std=std)
        self.to_out = Linear(dim_head * heads, dim, std=output_std)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        mask: Tensor | None = None,
        normalized_scores_kv: Tensor | None = None,
        normalized_scores_q: Tensor | None = None,
        rotary_emb: tuple[Angles, Angles] | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            x: (b, i, dim), the queries.
            context: (b, n, dim), or (b, r, n, dim) with r routed sets; None: x itself.
            mask: (b, n) or (b, r, n) bool, True = valid; None: all.
            normalized_scores_kv: (b, n) or (b, r, n), multiplies the values, and the keys with multiply_keys_by_score.
            normalized_scores_q: (b, i), multiplies the queries.
            rotary_emb: angles of the queries, (i, dim_head) or (b, i, dim_head), and of the keys, (n, dim_head), (b, n,
                dim_head) or (b, r, n, dim_head). The null key is not rotated.

        Returns:
            (b, i, dim).
        """
        self._check(x, context, mask)
        q, k, v = self.project(x, context, normalized_scores_kv, normalized_scores_q, rotary_emb)
        num_routes = 1 if mask is None or mask.dim() == 2 else mask.shape[1]
        if mask is not None and mask.dim() == 3:
            mask = self.by_head(mask, num_routes)
        if self.null_kv is not None:
            null_k, null_v = self.null(k)
            k, v = torch.cat((null_k, k), dim=2), torch.cat((null_v, v), dim=2)
            mask = None if mask is None else F.pad(mask, (1, 0), value=True)
        return self.to_out(merge_heads(attend(q, k, v, mask=mask)))

    def _check(self, x: Tensor, context: Tensor | None, mask: Tensor | None) -> None:
        """Raise for arguments of `forward` that do not fit."""
        check_tokens("x", x, self.dim)
        if context is None:
            context = x
        else:
            check_features("context", context, self.dim)
            check_device("context", context, x)
            if context.dim() not in (3, 4) or context.shape[0] != x.shape[0]:
                raise ValueError(
                    f"context: shape {tuple(context.shape)}; use ({x.shape[0]}, tokens, {self.dim}), or "
                    f"({x.shape[0]}, sets, tokens, {self.dim})"
                )
        if mask is None:
            return
        check_tensor("mask", mask)
        b, n = context.shape[0], context.shape[-2]
        fits = mask.dim() in (2, 3) and (mask.shape[0], mask.shape[-1]) == (b, n)
        if mask.dtype != torch.bool or not fits:
            raise ValueError(f"mask: {tuple(mask.shape)} of {mask.dtype}; use bool ({b}, {n}) or ({b}, sets, {n})")
        check_device("mask", mask, x)

    def project(
        self,
        x: Tensor,
        context: Tensor | None,
        normalized_scores_kv: Tensor | None,
        normalized_scores_q: Tensor | None,
        rotary_emb: tuple[Angles, Angles] | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, weighed and rotated; the arguments are those of `forward`.

        Returns:
            Queries (b, heads, i, dim_head), keys and values (b, heads, n, dim_head).
        """
        x = self.norm(x)
        context = x if context is None else self.norm(context)
        context = context.unsqueeze(1) if context.dim() == 3 else context
        num_routes = context.shape[1]
        if self.heads % num_routes:
            raise ValueError(f"heads: {self.heads} cannot be split among {num_routes} routed sets of keys and values")

        q = split_heads(self.to_q(x), self.heads)
        if normalized_scores_q is not None:
            q = q * normalized_scores_q.to(q.dtype)[:, None, :, None]
        k, v = self.to_kv(context).unbind(dim=-2)
        if normalized_scores_kv is not None:
            scores = normalized_scores_kv.unsqueeze(1) if normalized_scores_kv.dim() == 2 else normalized_scores_kv
            scores = self.by_head(scores, num_routes).to(v.dtype).unsqueeze(-1)
            k, v = k * scores if self.multiply_keys_by_score else k, v * scores
        if rotary_emb is not None:
            of_queries, of_keys = rotary_emb
            q = apply_rotary(q, map_angles(lambda a: a.unsqueeze(-3), of_queries))
            k = apply_rotary(
                k,
                map_angles(lambda a: self.by_head(a, num_routes) if a.dim() == 4 else a.unsqueeze(-3), of_keys),
            )
        return q, k, v

    def null(self, like: Tensor) -> Tensor:
        """The null key and value, (2, b, heads, 1, dim_head), for keys (b, heads, ..., dim_head)."""
        assert self.null_kv is not None
        return self.null_kv.to(like.dtype)[:, None, :, None, :].expand(-1, like.shape[0], -1, -1, -1)

    def by_head(self, of_routes: Tensor, num_routes: int) -> Tensor:
        """(b, r, n, ...) -> what broadcasts against (b, heads, n, ...): each route once for each of its heads."""
        return of_routes if num_routes == 1 else of_routes.repeat_interleave(self.heads // num_routes, dim=1)
