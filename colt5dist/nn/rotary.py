"""Rotary positions (Su et al., arXiv 2104.09864)."""

import torch
from torch import Tensor, nn


class RotaryEmbedding(nn.Module):
    """Angles of the rotary positions: `(seq_len) -> (seq_len, dim)`, the second half of dim repeating the first.

    The frequencies are computed at each call, in float32, and not kept in a buffer: a buffer would be rounded to
    bfloat16 together with the parameters, and positions beyond a few hundred would fall together.
    """

    def __init__(self, dim: int, theta: float = 10000) -> None:
        super().__init__()
        if dim % 2:
            raise ValueError(f"dim: {dim} is odd; rotary positions turn pairs, use an even dimension")
        self.dim = dim
        self.theta = theta

    def forward(
        self, seq_len: int, *, device: torch.device | None = None, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """Angles (seq_len, dim) of the positions 0 .. seq_len - 1; `dtype` is float32 or float64."""
        exponent = torch.arange(0, self.dim, 2, device=device, dtype=torch.float32) / self.dim
        frequencies = (1.0 / self.theta**exponent).to(dtype)
        position = torch.arange(seq_len, device=device, dtype=dtype)
        angles = position.unsqueeze(-1) * frequencies
        return torch.cat((angles, angles), dim=-1)


def apply_rotary(x: Tensor, angles: Tensor) -> Tensor:
    """Turn x (..., n, dim) by angles (..., n, dim) that broadcast over its leading dimensions; halves are paired.

    The sine and cosine are taken in the angles' type and rounded to that of x, so that x is never widened.
    """
    half = angles[..., : angles.shape[-1] // 2]
    cosine, sine = half.cos().to(x.dtype), half.sin().to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1)


def angle_dtype(x: Tensor) -> torch.dtype:
    """Type in which the angles for x are computed: float64 stays, everything else is float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
