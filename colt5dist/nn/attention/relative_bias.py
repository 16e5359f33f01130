"""T5's relative position bias (Raffel et al., arXiv 1910.10683, section 2.1) of a neighbourhood."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from colt5dist.nn.initial import normal_


class RelativeBias(nn.Module):
    """`() -> (heads, 2 * radius + 1)`: what is added to the score of a key at each distance.

    Entry r is of the key `radius - r` positions before the query. Half of the num_buckets learned numbers of a head are
    for keys up to the query's own position, half for later ones. Of each half, half are for one distance each, and half
    for distances that grow by a constant factor up to max_distance.

    Args:
        heads: attention heads.
        radius: largest distance of a key from its query.
        num_buckets: learned numbers of a head; a multiple of 4.
        max_distance: distance from which on all keys share a number; above num_buckets / 4.
        std: standard deviation of the initial values.
    """

    def __init__(
        self, heads: int, *, radius: int, num_buckets: int = 32, max_distance: int = 128, std: float = 0.02
    ) -> None:
        super().__init__()
        if num_buckets < 4 or num_buckets % 4:
            raise ValueError(f"num_buckets: {num_buckets} cannot be cut in four; use a multiple of 4")
        if max_distance <= num_buckets // 4:
            raise ValueError(f"max_distance: {max_distance} is no farther than the exact ones; use more")
        self.weight = nn.Parameter(normal_(torch.empty(num_buckets, heads), std))
        self._buckets = [_bucket(offset, num_buckets, max_distance) for offset in range(-radius, radius + 1)]
        self.register_buffer("buckets", torch.tensor(self._buckets), persistent=False)

    def reset_buckets(self) -> None:
        """Write the buffer again, where memory without content has taken its place (`nn.Module.to_empty`)."""
        buckets = self.get_buffer("buckets")
        buckets.copy_(torch.tensor(self._buckets, device=buckets.device))

    def forward(self) -> Tensor:
        """Of the weight's type."""
        # a product and no lookup: its gradient is a sum in a fixed order
        chosen = F.one_hot(self.get_buffer("buckets"), self.weight.shape[0])
        return (chosen.to(self.weight.dtype) @ self.weight).t()


def _bucket(offset: int, num_buckets: int, max_distance: int) -> int:
    """Row of the learned numbers for a key `offset` positions after the query."""
    half = num_buckets // 2
    first = half if offset > 0 else 0
    distance, exact = abs(offset), half // 2
    if distance < exact:
        return first + distance
    steps = math.log(distance / exact) / math.log(max_distance / exact) * (half - exact)
    return first + min(exact + int(steps), half - 1)
