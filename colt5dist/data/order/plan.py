"""The order of the samples: sample i of a run is a pure function of (shards, lengths, seed, i).

An epoch shows every block once. The blocks are assigned at random to windows of a few dozen blocks. In a window, each
block gets an objective such that all objectives have about equally many samples. The chunks of all blocks of a window
are shuffled together, and the windows are shuffled too. So a reader needs only the blocks of one window at a time, and
still its samples come from the whole corpus. World size, rank, workers and batch sizes play no role.

The assignment of blocks to windows (called a deal, as of cards) repeats after `DEALS` epochs; the shuffles never
repeat. So the samples of any number of past epochs can be counted from `DEALS` numbers, and the time to find sample i
does not grow with i.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from colt5dist.data.order.blocks import BlockLayout, Blocks, Chunk
from colt5dist.data.order.pair_blocks import PairBlocks, PairLayout
from colt5dist.data.order.random_numbers import Stream, below, permutation, random_bits
from colt5dist.data.tar_members import MEMBER_TOKENS

DEALS = 64  # number of different assignments of blocks to windows
WINDOW_TOKENS = 1 << 24  # approximate tokens per window, which a reader keeps in memory


@dataclass(frozen=True)
class PlannedSample:
    """What sample i is made from."""

    index: int
    """Number of the sample in the run."""
    epoch: int
    """Number of epochs before this one."""
    objective: int
    """Number of the objective in the mixture."""
    block: int
    """Number of the block in the shard set."""
    chunk: Chunk
    """Where its tokens are in the shard set."""
    source: int = 0
    """Number of the shard set among several."""


@dataclass(frozen=True)
class Deal:
    """The blocks of each window and their objectives."""

    blocks: NDArray[np.int64]
    """(windows, blocks of the largest window) block numbers; -1 fills shorter windows."""
    objectives: NDArray[np.int64]
    """Same shape: the objective of each block."""
    counts: NDArray[np.int64]
    """Same shape: the number of chunks of each block; 0 where there is no block."""


def block_tokens(raw_tokens: int, num_tokens: int) -> int:
    """Return the tokens per block: about 64 samples, fewer for very long inputs and for small sets.

    Large blocks leave few tokens over (half a sample per block, on average); with small blocks, every objective gets
    some.

    Args:
        raw_tokens: raw tokens of the longest sample.
        num_tokens: tokens of the shard set.
    """
    wide = min(64 * raw_tokens, max(1 << 20, 32 * raw_tokens))
    return min(wide, max(8 * raw_tokens, num_tokens // 16))


class Plan:
    """Finds the tokens of sample i of a shard set.

    Args:
        document_ends: (documents,) positions after the documents on the set's axis.
        raw_lengths: raw tokens of a full sample, for each objective.
        seed: seed of the order.
        weights: share of the samples that each objective gets, as a number of equal parts; None: equal shares.
        min_document_tokens: documents with fewer tokens are left out.
        pairs: whether each document is a sample, as it is; there is one objective then.
    """

    def __init__(
        self,
        document_ends: NDArray[np.int64],
        raw_lengths: Sequence[int],
        *,
        seed: int,
        weights: Sequence[int] | None = None,
        min_document_tokens: int = 0,
        pairs: bool = False,
    ) -> None:
        self._seed = seed
        self._weights = np.array(weights or [1] * len(raw_lengths), dtype=np.int64)
        self.raw_lengths = tuple(raw_lengths)
        size = block_tokens(max(raw_lengths), int(document_ends[-1]))
        self.blocks: Blocks | PairBlocks
        if pairs:
            self.blocks = PairBlocks(document_ends, size)
        else:
            self.blocks = Blocks(document_ends, size, self.raw_lengths, min_document_tokens=min_document_tokens)
        self.window_blocks = min(max(WINDOW_TOKENS // size, 8), 64)
        assert self.blocks.counts.any(axis=0).all(), "no text for a sample"
        self._deal_ends: list[int] = []  # samples up to the end of each deal
        # by how many samples each objective has too many in a window before each deal; the next deal compensates. The
        # start is random, within half a block: otherwise all windows would deviate in the same direction
        shape = -(-self.blocks.num_blocks // self.window_blocks), len(self.raw_lengths)
        most = np.maximum(self.blocks.counts.max(axis=0), 1)
        begin = random_bits(seed, 0, Stream.SURPLUS).random_raw(shape[0] * shape[1]).reshape(shape)
        self._surplus = [(begin % most.astype(np.uint64)).astype(np.int64) - most // 2]
        self._deal = lru_cache(maxsize=2)(self._make_deal)
        self._order = lru_cache(maxsize=2)(self._make_order)
        self._window = lru_cache(maxsize=4)(self._make_window)
        self._layout = lru_cache(maxsize=2 * self.window_blocks)(self._make_layout)

    def sample(self, index: int) -> PlannedSample:
        """Return what sample `index` is made from."""
        epoch, place = self._find_epoch(index)
        windows, window_ends = self._order(epoch)
        turn = bisect_right(window_ends, place)
        window = windows[turn]
        place -= window_ends[turn - 1] if turn else 0
        blocks, objectives, block_ends, chunks = self._window(epoch, window)
        place = int(chunks[place])
        slot = bisect_right(block_ends, place)
        place -= block_ends[slot - 1] if slot else 0
        block, objective = blocks[slot], objectives[slot]
        layout, offset = self._layout(epoch, block, objective)
        return PlannedSample(index, epoch, objective, block, layout.chunk(place, offset))

    def epoch_samples(self, epoch: int) -> int:
        """Return the number of samples in an epoch."""
        return int(self._deal(epoch % DEALS).counts.sum())

    def window_bytes(self, item_bytes: int) -> int:
        """Return an upper bound on the bytes of all members with blocks of a window, at `item_bytes` per token."""
        blocks = self.blocks
        return self.window_blocks * (int(np.diff(blocks.bounds).max()) + MEMBER_TOKENS) * item_bytes

    def _find_epoch(self, index: int) -> tuple[int, int]:
        """The epoch of a sample, and its place in it."""
        ends = self._deal_ends
        while len(ends) < DEALS and (not ends or ends[-1] <= index):
            ends.append((ends[-1] if ends else 0) + self.epoch_samples(len(ends)))
        rounds, index = divmod(index, ends[-1]) if len(ends) == DEALS else (0, index)
        deal = bisect_right(ends, index)
        return rounds * DEALS + deal, index - (ends[deal - 1] if deal else 0)

    def _make_deal(self, number: int) -> Deal:
        """Assign the blocks to windows, and objectives to the blocks of each window one after the other."""
        for earlier in range(len(self._surplus) - 1, number):
            self._deal(earlier)
        num_blocks = self.blocks.num_blocks
        num_windows = -(-num_blocks // self.window_blocks)
        shuffled = permutation(random_bits(self._seed, number, Stream.DEAL), num_blocks)
        # window w gets the blocks at w, w + num_windows, ..., so that the sizes of windows differ by at most one
        blocks = np.full((-(-num_blocks // num_windows), num_windows), -1, dtype=np.int64)
        blocks.reshape(-1)[:num_blocks] = shuffled
        objectives = np.zeros_like(blocks)
        counts = np.zeros_like(blocks)
        every_window = np.arange(num_windows)
        totals = self._surplus[number].copy()
        for slot, block in enumerate(blocks):
            offered = np.where(block[:, None] >= 0, self.blocks.counts[block], 0)
            # half of the block is counted: otherwise objectives with many samples per block would get too many
            objective = np.argmin((2 * totals + offered) / self._weights, axis=1)
            objectives[slot] = objective
            counts[slot] = offered[every_window, objective]
            totals[every_window, objective] += counts[slot]
        if len(self._surplus) == number + 1:
            # what all objectives have in common is subtracted, which keeps the numbers small
            alike = (totals // self._weights).min(axis=1, keepdims=True)
            self._surplus.append(totals - alike * self._weights)
        return Deal(blocks.T, objectives.T, counts.T)

    def _make_order(self, epoch: int) -> tuple[list[int], list[int]]:
        """The windows of an epoch in their order, and the number of samples up to the end of each."""
        counts = self._deal(epoch % DEALS).counts.sum(axis=1)
        windows = permutation(random_bits(self._seed, epoch, Stream.WINDOWS), len(counts))
        return windows.tolist(), np.cumsum(counts[windows]).tolist()

    def _make_window(self, epoch: int, window: int) -> tuple[list[int], list[int], list[int], NDArray[np.int64]]:
        """The blocks of a window, their objectives, the chunks up to the end of each, and the order of all chunks."""
        deal = self._deal(epoch % DEALS)
        ends = np.cumsum(deal.counts[window]).tolist()
        chunks = permutation(random_bits(self._seed, epoch, Stream.CHUNKS, window), ends[-1])
        return deal.blocks[window].tolist(), deal.objectives[window].tolist(), ends, chunks

    def _make_layout(self, epoch: int, block: int, objective: int) -> tuple[BlockLayout | PairLayout, int]:
        """The chunks of a block, and the offset at which its joined text is cut in this epoch."""
        layout = self.blocks.layout(block, objective)
        return layout, below(random_bits(self._seed, epoch, Stream.OFFSET, block), layout.num_offsets)
