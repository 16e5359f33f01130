"""How a global batch is divided: the rank, the micro-batch and the row of each sample.

The samples of a global batch, in the order of the run, form an array of shape (micro-batches, rows, ranks) in row-major
order, so neighbouring samples go to neighbouring ranks. Rank r of W ranks gets samples r, r + W, r + 2W, ... of the
global batch, and the first of them form its first micro-batch.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class SamplePlace:
    """Where a sample of a global batch is processed; all numbers start at 0."""

    rank: int
    """Rank that gets the sample."""
    micro_batch: int
    """Number of the micro-batch among those of the rank in this step."""
    row: int
    """Row of the micro-batch."""


@dataclass(frozen=True, kw_only=True)
class BatchLayout:
    """The division of a global batch among ranks, micro-batches and rows.

    Args:
        world_size: number of ranks.
        micro_batch_size: rows (samples) of a micro-batch.
    """

    world_size: int
    micro_batch_size: int

    def place(self, position: int) -> SamplePlace:
        """Where the sample at `position` (from 0) of the global batch is processed."""
        row_of_rank, rank = divmod(position, self.world_size)
        micro_batch, row = divmod(row_of_rank, self.micro_batch_size)
        return SamplePlace(rank=rank, micro_batch=micro_batch, row=row)

    def micro_batches(self, samples: NDArray[np.int64], rank: int) -> NDArray[np.int64]:
        """The share of one rank.

        Args:
            samples: (samples,) sample numbers of a global batch, in the order of the run; a multiple of
                world_size * micro_batch_size.
            rank: number of the rank, from 0.

        Returns:
            (micro-batches, micro_batch_size) sample numbers.
        """
        return samples.reshape(-1, self.micro_batch_size, self.world_size)[:, :, rank]
