"""Root-mean-square normalisation."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from colt5dist.nn.checks import check_features
from colt5dist.ops.checks import check_counts, check_optional_not_negative


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

    def forward(self, x: Tensor) -> Tensor:
        """x (..., dim) -> (..., dim)."""
        check_features("x", x, self.dim)
        return F.rms_norm(x, (self.dim,), self.gamma, self.eps)
