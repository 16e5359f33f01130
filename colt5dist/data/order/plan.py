"""The order of the samples: sample i of a run is a pure function of (shards, lengths, seed, i).

An epoch shows every block once. The blocks are dealt at random to windows of a few dozen; in a window every objective
gets blocks until its samples are as many as those of the others; the chunks of all blocks of a window are shuffled
together, and so are the windows. A reader therefore needs the blocks of one window at a time, while its samples come
from all over the corpus. World size, rank, workers and batch sizes appear nowhere.

How the blocks are dealt repeats after `DEALS` epochs, the shuffles never do: so the samples of any number of past
epochs can be counted from `DEALS` numbers, and sample i is found in a time that does not grow with i.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from colt5dist.data.order.blocks import BlockLayout, Blocks, Chunk
from colt5dist.data.order.random_numbers import Stream, below, permutation, random_bits
from colt5dist.data.tar_members import MEMBER_TOKENS

DEALS = 64
WINDOW_TOKENS = 1 << 24  # a reader keeps about so many tokens in memory


@dataclass(frozen=True)
class PlannedSample:
    """What sample i is made from."""

    index: int
    """Number of the sample in the run."""
    epoch: int
    """How often all blocks were shown before."""
    objective: int
    """Number of the objective in the mixture."""
    block: int
    """Number of the block in the shard set."""
    chunk: Chunk
    """Where its tokens are."""
    source: int = 0
    """Number of the shard set among the sources."""


@dataclass(frozen=True)
class Deal:
    """The blocks of each window and their objectives."""

    blocks: NDArray[np.int64]
    """(windows, most blocks in a window) block numbers; -1 fills short windows."""
    objectives: NDArray[np.int64]
    """Same shape: the objective of each block."""
    counts: NDArray[np.int64]
    """Same shape: the chunks of each block; 0 where there is none."""


def block_tokens(raw_tokens: int, num_tokens: int) -> int:
    """Tokens of a block: about 64 samples, fewer for very long inputs and for small sets.

    Large blocks leave little over (half a sample a block in the mean), small ones let every objective have some.
    """
    wide = min(64 * raw_tokens, max(1 << 20, 32 * raw_tokens))
    return min(wide, max(8 * raw_tokens, num_tokens // 16))


class Plan:
    """Finds the tokens of sample i."""

    def __init__(
        self,
        document_ends: NDArray[np.int64],
        raw_lengths: Sequence[int],
        *,
        seed: int,
        weights: Sequence[int] | None = None,
        min_document_tokens: int = 0,
    ) -> None:
        """Plan the samples of a shard set.

        Args:
            document_ends: (documents,) ends of the documents on the set's axis.
            raw_lengths: raw tokens of a full sample, an objective each.
            weights: parts of the samples that each objective gets; None: equal parts.
            seed: another seed is another order.
            min_document_tokens: documents of fewer tokens are left out.
        """
        self._seed = seed
        self._weights = np.array(weights or [1] * len(raw_lengths), dtype=np.int64)
        self.raw_lengths = tuple(raw_lengths)
        size = block_tokens(max(raw_lengths), int(document_ends[-1]))
        self.blocks = Blocks(document_ends, size, self.raw_lengths, min_document_tokens=min_document_tokens)
        self.window_blocks = min(max(WINDOW_TOKENS // size, 8), 64)
        assert self.blocks.counts.any(axis=0).all(), "no text for a sample"
        self._deal_ends: list[int] = []  # samples up to the end of each deal
        # samples that each objective had too many in a window before each deal; the next makes up for it. It begins
        # at random, within half a block: else the windows would all err in the same direction
        shape = -(-self.blocks.num_blocks // self.window_blocks), len(self.raw_lengths)
        most = np.maximum(self.blocks.counts.max(axis=0), 1)
        begin = random_bits(seed, 0, Stream.SURPLUS).random_raw(shape[0] * shape[1]).reshape(shape)
        self._surplus = [(begin % most.astype(np.uint64)).astype(np.int64) - most // 2]
        self._deal = lru_cache(maxsize=2)(self._make_deal)
        self._order = lru_cache(maxsize=2)(self._make_order)
        self._window = lru_cache(maxsize=4)(self._make_window)
        self._layout = lru_cache(maxsize=2 * self.window_blocks)(self._make_layout)

    def sample(self, index: int) -> PlannedSample:
        """What sample `index` is made from."""
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
        """Samples of an epoch."""
        return int(self._deal(epoch % DEALS).counts.sum())

    def window_bytes(self, item_bytes: int) -> int:
        """Bytes of all members that a window's blocks lie in, at `item_bytes` a token."""
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
        """Deal the blocks to windows, and the objectives to the blocks of each window in turn."""
        for earlier in range(len(self._surplus) - 1, number):
            self._deal(earlier)
        num_blocks = self.blocks.num_blocks
        num_windows = -(-num_blocks // self.window_blocks)
        shuffled = permutation(random_bits(self._seed, number, Stream.DEAL), num_blocks)
        # window w gets places w, w + windows, ... so that sizes differ by one at most
        blocks = np.full((-(-num_blocks // num_windows), num_windows), -1, dtype=np.int64)
        blocks.reshape(-1)[:num_blocks] = shuffled
        objectives = np.zeros_like(blocks)
        counts = np.zeros_like(blocks)
        every_window = np.arange(num_windows)
        totals = self._surplus[number].copy()
        for slot, block in enumerate(blocks):
            offered = np.where(block[:, None] >= 0, self.blocks.counts[block], 0)
            # half of the block counts with it: else objectives with many samples a block would get too many
            objective = np.argmin((2 * totals + offered) / self._weights, axis=1)
            objectives[slot] = objective
            counts[slot] = offered[every_window, objective]
            totals[every_window, objective] += counts[slot]
        if len(self._surplus) == number + 1:
            # what all have alike is taken away, which keeps the numbers small
            alike = (totals // self._weights).min(axis=1, keepdims=True)
            self._surplus.append(totals - alike * self._weights)
        return Deal(blocks.T, objectives.T, counts.T)

    def _make_order(self, epoch: int) -> tuple[list[int], list[int]]:
        """The windows of an epoch in their order, and the samples up to the end of each."""
        counts = self._deal(epoch % DEALS).counts.sum(axis=1)
        windows = permutation(random_bits(self._seed, epoch, Stream.WINDOWS), len(counts))
        return windows.tolist(), np.cumsum(counts[windows]).tolist()

    def _make_window(self, epoch: int, window: int) -> tuple[list[int], list[int], list[int], NDArray[np.int64]]:
        """The blocks of a window, their objectives, the chunks up to the end of each, and the order of all chunks."""
        deal = self._deal(epoch % DEALS)
        ends = np.cumsum(deal.counts[window]).tolist()
        chunks = permutation(random_bits(self._seed, epoch, Stream.CHUNKS, window), ends[-1])
        return deal.blocks[window].tolist(), deal.objectives[window].tolist(), ends, chunks

    def _make_layout(self, epoch: int, block: int, objective: int) -> tuple[BlockLayout, int]:
        """The chunks of a block, and where its joined text is cut in this epoch."""
        layout = self.blocks.layout(block, objective)
        return layout, below(random_bits(self._seed, epoch, Stream.OFFSET, block), layout.num_offsets)
