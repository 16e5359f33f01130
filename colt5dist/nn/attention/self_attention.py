"""Attention of a whole sequence to itself: the dense encoder's, the decoder's and, within patches, the image
layer's."""

from torch import Tensor, nn

from colt5dist.nn.attention.attend import attend, merge_heads
from colt5dist.nn.attention.rotary import Angles, rotated_queries_and_keys
from colt5dist.nn.checks import check_mask, check_tokens
from colt5dist.nn.dropout import Dropout, drop
from colt5dist.nn.linear import Linear
from colt5dist.nn.norm import RMSNorm, norm_branch
from colt5dist.ops.checks import check_counts, check_optional_not_negative


class SelfAttention(nn.Module):
    """Attention of a sequence to itself, without bias: x (b, n, dim) -> (b, n, dim).

    Arguments from causal on are not in colt5-attention.

    Args:
        dim: width of a token.
        dim_head: width of an attention head.
        heads: attention heads.
        use_flash: changes nothing: PyTorch's fused kernels serve wherever the shapes allow. Kept from the signature of
            colt5-attention.
        prenorm: whether an RMSNorm comes first.
        causal: whether a position sees only itself and what is before it.
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
        use_flash: bool = False,
        prenorm: bool = False,
        *,
        causal: bool = False,
        norm_eps: float | None = None,
        std: float | None = None,
        output_std: float | None = None,
    ) -> None:
        super().__init__()
        check_counts(dim=dim, dim_head=dim_head, heads=heads)
        check_optional_not_negative(norm_eps=norm_eps, std=std, output_std=output_std)
        self.dim = dim
        self.heads = heads
        self.causal = causal
        self.norm = RMSNorm(dim, eps=norm_eps) if prenorm else nn.Identity()
        self.to_qkv = Linear(dim, dim_head * heads * 3, std=std)
        self.to_out = Linear(dim_head * heads, dim, std=output_std)

    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        rotary_angles: Angles | None = None,
        residual: bool = False,
        dropout: Dropout | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            x: (b, n, dim).
            mask: (b, n) bool, True = valid; None: all. Not with causal.
            rotary_angles: of the n positions; None: no rotary positions.
            residual: whether to add x to the result.
            dropout: of what is added to x with residual; None: none.

        Returns:
            (b, n, dim).
        """
        check_tokens("x", x, self.dim)
        check_mask("mask", mask, x.shape[:2], x)
        x, normed = norm_branch(self.norm, x, residual=residual)
        q, k, v = rotated_queries_and_keys(self.to_qkv(normed), rotary_angles, self.heads)
        out = self.to_out(merge_heads(attend(q, k, v, mask=mask, causal=self.causal)))
        return x + drop(out, dropout, 0) if residual else out
