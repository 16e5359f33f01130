"""Root-mean-square normalisation."""

from typing import Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from colt5dist.nn.checks import check_features
from colt5dist.ops.checks import check_counts, check_optional_not_negative
from colt5dist.ops.rms_norm import rms_norm_with_residual


class RMSNorm(nn.Module):
    """x / ||x|| * sqrt(dim) * gamma over the last dimension, without bias.

    x (..., dim) -> the same shape and type. The root is taken in float32 whatever the type of x (float64 stays).

    Args:
        dim: size of the last dimension of x.
        eps: added to the mean square under the root. None: 1e-24 / dim, as in colt5-attention, so small that only
            vectors shorter than about 1e-12 are not brought to length sqrt(dim).

    Raises:
        TypeError: an argument has the wrong type, such as a string for a number.
        ValueError: an argument has a wrong value; the message names it and says what to use.
    """

    def __init__(self, dim: int, *, eps: float | None = None) -> None:
        super().__init__()
        check_counts(dim=dim)
        check_optional_not_negative(eps=eps)
        self.dim = dim
        self.eps = 1e-24 / dim if eps is None else eps
        self.gamma = nn.Parameter(torch.ones(dim))

    @overload
    def forward(self, x: Tensor) -> Tensor: ...

    @overload
    def forward(self, x: Tensor, *, residual: Literal[True]) -> tuple[Tensor, Tensor]: ...

    def forward(self, x: Tensor, *, residual: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Normalise.

        Args:
            x: (..., dim).
            residual: whether to return x too, for the sum `x + branch(normalised x)`: on GPUs one kernel of the
                backward pass then computes the gradient that comes through the norm and adds the one of the sum.

        Returns:
            The normalised x (..., dim); with residual a tuple of x, to be used in the sum, and this.
        """
        check_features("x", x, self.dim)
        if residual and x.is_cuda and x.dtype == self.gamma.dtype and x.dtype != torch.float64:
            return rms_norm_with_residual(x, self.gamma, self.eps)
        normed = F.rms_norm(x, (self.dim,), self.gamma, self.eps)
        return (x, normed) if residual else normed


def norm_branch(norm: nn.Module, x: Tensor, *, residual: bool) -> tuple[Tensor, Tensor]:
    """The input of a branch's residual sum, and of the branch behind its norm, an RMSNorm or nn.Identity."""
    if residual and isinstance(norm, RMSNorm):
        return norm(x, residual=True)
    return x, norm(x)
