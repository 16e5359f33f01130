"""Cross-attention with one head of keys and values (Shazeer, arXiv 1911.02150)."""

from einops import rearrange
from torch import Tensor, nn

from colt5dist.nn.attention.attend import attend
from colt5dist.nn.checks import check_mask, check_tokens
from colt5dist.nn.dropout import Dropout, drop
from colt5dist.nn.linear import Linear
from colt5dist.nn.norm import RMSNorm, norm_branch
from colt5dist.ops.checks import check_counts, check_optional_not_negative


class MultiQueryAttention(nn.Module):
    """Cross-attention whose heads share one key and one value of width dim_head, without bias.

    Queries x (b, i, dim) attend to context (b, n, dim). x is normalised here, the context comes normalised. There are
    no positions: those of the decoder and of the encoder are not on one scale, and T5, whose relative bias is the
    encoder's own and the decoder's own, has none here either.

    Args:
        dim: width of a token of x and of the context.
        dim_head: width of an attention head.
        heads: attention heads.
        norm_eps: added to the mean square in RMSNorm; None: the smallest that is of use, as in colt5-attention.
        std: standard deviation of the initial weights; None: PyTorch's initialisation.
        output_std: the same of the last linear map.
    """

    def __init__(
        self,
        dim: int,
        *,
        dim_head: int,
        heads: int,
        norm_eps: float | None = None,
        std: float | None = None,
        output_std: float | None = None,
    ) -> None:
        super().__init__()
        check_counts(dim=dim, dim_head=dim_head, heads=heads)
        check_optional_not_negative(norm_eps=norm_eps, std=std, output_std=output_std)
        self.dim = dim
        self.heads = heads
        self.norm = RMSNorm(dim, eps=norm_eps)
        self.to_q = Linear(dim, dim_head * heads, std=std)
        self.to_kv = Linear(dim, dim_head * 2, std=std)
        self.to_out = Linear(dim_head * heads, dim, std=output_std)

    def forward(
        self,
        x: Tensor,
        context: Tensor,
        *,
        mask: Tensor | None = None,
        residual: bool = False,
        dropout: Dropout | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            x: (b, i, dim).
            context: (b, n, dim), normalised.
            mask: (b, n) bool, True = valid; None: all. A sample without a valid context token gets 0.
            residual: whether to add x to the result.
            dropout: of what is added to x with residual; None: none.

        Returns:
            (b, i, dim).
        """
        check_tokens("x", x, self.dim)
        check_tokens("context", context, self.dim)
        check_mask("mask", mask, context.shape[:2], context, "context")
        x, normed = norm_branch(self.norm, x, residual=residual)
        q = self.to_q(normed)
        k, v = self.to_kv(context).unsqueeze(1).chunk(2, dim=-1)
        # the heads are further queries of one head: keys and values are not repeated, and nothing is transposed
        out = attend(rearrange(q, "b i (h d) -> b 1 (i h) d", h=self.heads), k, v, mask=mask)
        out = self.to_out(rearrange(out, "b 1 (i h) d -> b i (h d)", h=self.heads))
        return x + drop(out, dropout, 0) if residual else out
