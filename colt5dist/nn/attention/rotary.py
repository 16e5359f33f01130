"""Rotary positions (Su et al., arXiv 2104.09864)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from colt5dist.ops.checks import check_counts, check_positive


class RotaryEmbedding(nn.Module):
    """Angles of the rotary positions: `(seq_len) -> (seq_len, dim)`.

    The second half of dim repeats the first. The frequencies are computed at each call, in float32, and not kept in a
    buffer: a buffer would be rounded to bfloat16 together with the parameters, and positions beyond a few hundred would
    coincide.

    Args:
        dim: width of the vectors to turn, an attention head; even.
        theta: base of the frequencies.

    Raises:
        TypeError: an argument has the wrong type, such as a string for a number.
        ValueError: an argument has a wrong value; the message names it and says what to use.
    """

    def __init__(self, dim: int, theta: float = 10000) -> None:
        super().__init__()
        check_counts(dim=dim)
        check_positive(theta=theta)
        if dim % 2:
            raise ValueError(f"dim: {dim} is odd; rotary positions turn pairs, use an even dimension")
        self.dim = dim
        self.theta = theta

    def forward(
        self, seq_len: int, *, device: torch.device | None = None, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """Angles (seq_len, dim) of the positions 0 .. seq_len - 1; `dtype` is float32 or float64."""
        check_counts(seq_len=seq_len, at_least=0)
        return self.at(torch.arange(seq_len, device=device, dtype=dtype))

    def at(self, positions: Tensor) -> Tensor:
        """Angles (..., dim) of positions (...), float32 or float64."""
        angles = positions.unsqueeze(-1) * self.frequencies(positions.device).to(positions.dtype)
        return torch.cat((angles, angles), dim=-1)

    def rotation(self, seq_len: int, *, device: torch.device, dtype: torch.dtype) -> "Rotation":
        """Cosine and sine of the positions 0 .. seq_len - 1 for vectors of a type, computed once for many layers."""
        angles = self(seq_len, device=device, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        return rotation_by(angles, dtype)

    def frequencies(self, device: torch.device | None = None) -> Tensor:
        """Angle (dim / 2,) float32 by which each pair turns from one position to the next."""
        exponent = torch.arange(0, self.dim, 2, device=device, dtype=torch.float32) / self.dim
        return 1.0 / self.theta**exponent


class Rotation(NamedTuple):
    """What `apply_rotary` needs of angles: the same for every layer, so that one computation serves all of them."""

    cosine: Tensor
    """(..., dim / 2)."""
    sine: Tensor
    """(..., dim / 2)."""


Angles = Tensor | Rotation
"""Angles (..., dim), whose second half repeats the first, or their cosine and sine."""


def rotation_by(angles: Tensor, dtype: torch.dtype) -> Rotation:
    """Cosine and sine of angles (..., dim), taken in the type of the angles and rounded to `dtype`."""
    half = angles[..., : angles.shape[-1] // 2]
    return Rotation(half.cos().to(dtype), half.sin().to(dtype))


def map_angles(function: Callable[[Tensor], Tensor], angles: Angles) -> Angles:
    """Apply a function that moves or repeats rows to angles, or to their cosine and sine."""
    return Rotation(*map(function, angles)) if isinstance(angles, Rotation) else function(angles)


class _Rotate(torch.autograd.Function):
    """The gradient of a rotation is the opposite rotation: nothing of x is kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        ctx.save_for_backward(cosine, sine)
        return _rotate(x, cosine, sine)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cosine, sine = ctx.saved_tensors
        return _rotate(grads[0], cosine, -sine), None, None


def _rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    turned_first = torch.addcmul(first * cosine, second, sine, value=-1)
    turned_second = torch.addcmul(second * cosine, first, sine)
    return torch.cat((turned_first, turned_second), dim=-1)


def apply_rotary(x: Tensor, angles: Angles) -> Tensor:
    """Turn x (..., dim) by angles that broadcast against it; halves of the last dimension are paired.

    The sine and cosine are taken in the angles' type and rounded to that of x, so that x is never widened.
    """
    cosine, sine = angles if isinstance(angles, Rotation) else rotation_by(angles, x.dtype)
    return _Rotate.apply(x, cosine.to(x.dtype), sine.to(x.dtype))


def rotated_queries_and_keys(qkv: Tensor, angles: Angles | None, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of one projection, the first two rotated.

    Args:
        qkv: (b, n, 3 * heads * dim).
        angles: of the n positions; None: no rotation.
        num_heads: heads.

    Returns:
        Queries, keys, values, each (b, heads, n, dim), stored in memory as (b, n, heads, dim).
    """
    qkv = rearrange(qkv, "b n (three h d) -> b n three h d", three=3, h=num_heads)
    if angles is None:
        q, k, v = qkv.unbind(2)
    else:
        q, k = apply_rotary(qkv[:, :, :2], map_angles(lambda a: a[:, None, None], angles)).unbind(2)
        v = qkv[:, :, 2]
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def angle_dtype(x: Tensor) -> torch.dtype:
    """Type in which the angles for x are computed: float64 stays, everything else is float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def branch_angles(rotary: RotaryEmbedding | None, x: Tensor, given: Angles | None) -> Angles | None:
    """Angles of the positions of x (b, n, dim) for a branch with rotary positions; None for one without."""
    if rotary is None or given is not None:
        return None if rotary is None else given
    return rotary(x.shape[1], device=x.device, dtype=angle_dtype(x))
