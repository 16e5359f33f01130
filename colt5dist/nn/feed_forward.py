"""Feed-forward branch: norm, linear, GELU, linear."""

import torch.nn.functional as F
from torch import Tensor, nn

from colt5dist.nn.checks import check_features
from colt5dist.nn.dropout import Dropout, drop
from colt5dist.nn.linear import Linear
from colt5dist.nn.norm import RMSNorm, norm_branch
from colt5dist.ops.checks import check_counts, check_optional_counts, check_optional_not_negative, check_positive
from colt5dist.ops.gated_gelu import gated_gelu

HIDDEN, OUTPUT = 0, 1
"""Places of dropout."""


class FeedForward(nn.Module):
    """Norm, linear map, GELU, linear map: x (..., dim) -> (..., dim).

    Arguments from hidden_dim on are not in colt5-attention: they are what T5.1.1 and CoLT5 do otherwise.

    Args:
        dim: width of a token.
        mult: hidden size in multiples of dim.
        hidden_dim: the hidden size itself, in place of dim * mult; None: dim * mult, rounded down.
        gated: whether it is gated GELU (Shazeer, arXiv 2002.05202): the first linear map is twice as wide, the gate in
            its first half, and GELU has the tanh form, as in T5.1.1.
        bias: whether both linear maps have a bias.
        prenorm: whether an RMSNorm comes first; False leaves the norm to the caller.
        norm_eps: added to the mean square in RMSNorm; None: the smallest that is of use, as in colt5-attention.
        std: standard deviation of the initial weight of the first linear map; None: PyTorch's initialisation.
        output_std: the same of the second linear map.

    Raises:
        TypeError: an argument has the wrong type, such as a string for a number.
        ValueError: an argument has a wrong value; the message names it and says what to use.
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
        check_counts(dim=dim)
        check_positive(mult=mult)
        check_optional_counts(hidden_dim=hidden_dim)
        check_optional_not_negative(norm_eps=norm_eps, std=std, output_std=output_std)
        self.dim = dim
        hidden_dim = int(dim * mult) if hidden_dim is None else hidden_dim
        self.gated = gated
        self.norm = RMSNorm(dim, eps=norm_eps) if prenorm else nn.Identity()
        self.to_hidden = Linear(dim, hidden_dim * (2 if gated else 1), bias=bias, std=std)
        self.to_out = Linear(hidden_dim, dim, bias=bias, std=output_std)

    def forward(self, x: Tensor, *, residual: bool = False, dropout: Dropout | None = None) -> Tensor:
        """Both linear maps.

        Args:
            x: (..., dim); (b, n, dim) with dropout.
            residual: whether to add x to the result.
            dropout: of the hidden units and, with residual, of what is added to x; None: none.

        Returns:
            (..., dim).
        """
        check_features("x", x, self.dim)
        x, normed = norm_branch(self.norm, x, residual=residual)
        hidden = self.to_hidden(normed)
        hidden = gated_gelu(hidden) if self.gated else F.gelu(hidden)
        out = self.to_out(drop(hidden, dropout, HIDDEN))
        return x + drop(out, dropout, OUTPUT) if residual else out
