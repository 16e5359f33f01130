"""Cuts a set of pairs into blocks of neighbouring pairs: the counterpart of `blocks.py` for documents that stay whole.

Each document is one chunk, so the plan shows every pair once in every epoch. A block ends where a document ends. A
document that is longer than a block is a block of its own.
"""

import numpy as np
from numpy.typing import NDArray

from colt5dist.data.order.blocks import Chunk


class PairLayout:
    """The pairs of one block.

    Args:
        ends: (pairs + 1,) where the block begins, and positions after its pairs on the set's axis.
    """

    num_offsets = 1
    """Nothing is joined and cut, so there is no choice where to begin."""

    def __init__(self, ends: NDArray[np.int64]) -> None:
        self._ends = ends

    def chunk(self, number: int, offset: int) -> Chunk:
        """Return a pair of the block.

        Args:
            number: number of the pair in the block.
            offset: 0.
        """
        assert 0 <= number < len(self._ends) - 1 and offset == 0, (number, offset)
        return Chunk(self._ends[number : number + 1], self._ends[number + 1 : number + 2], np.array([False]))


class PairBlocks:
    """The blocks of a set of pairs, and how many pairs each holds.

    Args:
        document_ends: (pairs,) positions after the pairs on the set's axis.
        block_tokens: approximate tokens per block.
    """

    def __init__(self, document_ends: NDArray[np.int64], block_tokens: int) -> None:
        self._document_ends = document_ends
        num_tokens = int(document_ends[-1])
        wanted = np.linspace(0, num_tokens, max(1, round(num_tokens / block_tokens)) + 1).astype(np.int64)
        # numbers of the first pair of each block, and of the one after the last
        self._firsts = np.unique(np.searchsorted(document_ends, wanted[:-1], side="right"))
        self._firsts = np.append(self._firsts, len(document_ends))
        self.bounds = np.concatenate(([0], document_ends[self._firsts[1:] - 1])).astype(np.int64)
        self.counts = np.diff(self._firsts)[:, None]

    @property
    def num_blocks(self) -> int:
        """Number of blocks in the set."""
        return len(self.counts)

    def layout(self, block: int, objective: int) -> PairLayout:
        """Return the pairs of one block."""
        first, stop = self._firsts[block : block + 2]
        ends = np.concatenate(([self.bounds[block]], self._document_ends[first:stop])).astype(np.int64)
        return PairLayout(ends)
