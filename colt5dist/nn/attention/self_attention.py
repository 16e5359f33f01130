"""Attention of a whole sequence to itself: the dense encoder's, the decoder's and, within patches, the image
layer's."""

from torch import Tensor, nn

from colt5dist.nn.attention.attend import attend, merge_heads
from colt5dist.nn.attention.rotary import rotated_queries_and_keys
from colt5dist.nn.linear import Linear
from colt5dist.nn.norm import RMSNorm


class SelfAttention(nn.Module):
    """x (b, n, dim) -> (b, n, dim), `heads` heads of `dim_head`, linear maps without bias.

    prenorm: RMSNorm before it. use_flash belongs to the seed's signature and changes nothing: PyTorch's fused kernels
    serve wherever the shapes allow.

    Keyword-only, beyond the seed: causal: a position sees itself and what is before it. norm_eps: of RMSNorm. std,
    output_std: standard deviations of the initial weights (None: PyTorch's initialisation).
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
        self.heads = heads
        self.causal = causal
        self.norm = RMSNorm(dim, eps=norm_eps) if prenorm else nn.Identity()
        self.to_qkv = Linear(dim, dim_head * heads * 3, std=std)
        self.to_out = Linear(dim_head * heads, dim, std=output_std)

    def forward(self, x: Tensor, *, mask: Tensor | None = None, rotary_angles: Tensor | None = None) -> Tensor:
        """x (b, n, dim); mask (b, n) bool, True = valid (not with causal); rotary_angles (n, dim_head) -> (b, n,
        dim)."""
        q, k, v = rotated_queries_and_keys(self.to_qkv(self.norm(x)), rotary_angles, self.heads)
        return self.to_out(merge_heads(attend(q, k, v, mask=mask, causal=self.causal)))
