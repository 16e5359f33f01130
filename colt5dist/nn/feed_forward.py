"""Feed-forward branch: norm, linear, GELU, linear."""

import torch.nn.functional as F
from torch import Tensor, nn

from colt5dist.nn.gated_gelu import gated_gelu
from colt5dist.nn.linear import Linear
from colt5dist.nn.norm import RMSNorm


class FeedForward(nn.Module):
    """x (..., dim) -> (..., dim): RMSNorm, linear with bias to `dim * mult`, GELU, linear with bias.

    What T5.1.1 and CoLT5 do otherwise is keyword-only: hidden_dim: exact hidden size, in place of `dim * mult`. gated:
    gated GELU (Shazeer, arXiv 2002.05202), whose first linear map is twice as wide, the gate in its first half, and
    whose GELU is the tanh form, as in T5.1.1. bias: of both linear maps. prenorm: False leaves the norm to the caller.
    norm_eps: of RMSNorm. std, output_std: standard deviations of the initial weights of the first and the second
    linear map (None: PyTorch's initialisation).
    """

    def __init__(
        self,
        dim: int,
        mult: float = 4,
        *,
        hidden_dim: int | None = None,
        gated: bool = False,
        bias: bool = True,
        prenorm: bool = True,
        norm_eps: float | None = None,
        std: float | None = None,
        output_std: float | None = None,
    ) -> None:
        super().__init__()
        hidden_dim = int(dim * mult) if hidden_dim is None else hidden_dim
        self.gated = gated
        self.norm = RMSNorm(dim, eps=norm_eps) if prenorm else nn.Identity()
        self.to_hidden = Linear(dim, hidden_dim * (2 if gated else 1), bias=bias, std=std)
        self.to_out = Linear(hidden_dim, dim, bias=bias, std=output_std)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., dim) -> (..., dim)."""
        hidden = self.to_hidden(self.norm(x))
        if self.gated:
            return self.to_out(gated_gelu(hidden))
        return self.to_out(F.gelu(hidden))
