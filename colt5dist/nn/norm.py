"""Root-mean-square normalisation."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """x / ||x|| * sqrt(dim) * gamma over the last dimension, without bias; x (..., dim) -> same shape and type.

    eps is added to the mean square under the root, which is taken in float32 whatever the type of x (float64 stays).
    None is the seed's form: so small that only vectors shorter than about 1e-12 are not brought to length sqrt(dim).
    """

    def __init__(self, dim: int, *, eps: float | None = None) -> None:
        super().__init__()
        self.dim = dim
        self.eps = 1e-24 / dim if eps is None else eps
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """x (..., dim) -> (..., dim)."""
        return F.rms_norm(x, (self.dim,), self.gamma, self.eps)
