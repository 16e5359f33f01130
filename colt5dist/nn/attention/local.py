"""Attention of each position to its neighbours: the light branch of conditional attention."""

from torch import Tensor, nn

from colt5dist.nn.attention.attend import merge_heads
from colt5dist.nn.attention.relative_bias import RelativeBias
from colt5dist.nn.attention.rotary import Angles, rotated_queries_and_keys
from colt5dist.nn.checks import check_mask, check_tokens
from colt5dist.nn.linear import Linear
from colt5dist.ops.checks import check_counts, check_optional_not_negative
from colt5dist.ops.local_attention import local_attention


class LocalSelfAttention(nn.Module):
    """Attention of each position to its neighbours, without bias: x (b, n, dim) -> (b, n, dim).

    Args:
        dim: width of a token.
        dim_head: width of an attention head.
        heads: attention heads.
        radius: how far away a position may be that is attended to, 1 or more. With causal: tokens of a window.
        causal: whether no position sees a later one; it then sees its own window of radius tokens and the one before.
        prenorm: whether a LayerNorm with bias comes first, as in colt5-attention.
        relative_bias: whether T5's learned bias of the distance is added to the scores.
        std: standard deviation of the initial weights; None: PyTorch's initialisation.
        output_std: the same of the last linear map.
    """

    def __init__(
        self,
        dim: int,
        *,
        dim_head: int,
        heads: int,
        radius: int,
        causal: bool = False,
        prenorm: bool = True,
        relative_bias: bool = False,
        std: float | None = None,
        output_std: float | None = None,
    ) -> None:
        super().__init__()
        check_counts(dim=dim, dim_head=dim_head, heads=heads, radius=radius)
        check_optional_not_negative(std=std, output_std=output_std)
        self.dim = dim
        self.heads = heads
        self.radius = radius
        self.causal = causal
        self.norm = nn.LayerNorm(dim) if prenorm else nn.Identity()
        self.to_qkv = Linear(dim, dim_head * heads * 3, std=std)
        self.to_out = Linear(dim_head * heads, dim, std=output_std)
        self.relative_bias: RelativeBias | None = None
        if relative_bias:
            self.relative_bias = RelativeBias(heads, radius=radius, std=0.02 if std is None else std)

    def forward(self, x: Tensor, *, mask: Tensor | None = None, rotary_angles: Angles | None = None) -> Tensor:
        """Attend.

        Args:
            x: (b, n, dim).
            mask: (b, n) bool, True = valid; None: all.
            rotary_angles: of the n positions; None: no rotary positions.

        Returns:
            (b, n, dim).
        """
        check_tokens("x", x, self.dim)
        check_mask("mask", mask, x.shape[:2], x)
        q, k, v = rotated_queries_and_keys(self.to_qkv(self.norm(x)), rotary_angles, self.heads)
        bias = None if self.relative_bias is None else self.relative_bias()
        out = local_attention(q, k, v, radius=self.radius, causal=self.causal, mask=mask, bias=bias)
        return self.to_out(merge_heads(out))
