"""Cuts a shard set into blocks of neighbouring documents, and a block into the texts of its samples.

A block is a stretch of about `block_tokens` tokens of the set's axis. It ends where a document ends, unless none ends
near; then a long document goes on in the next block. For an objective that takes L raw tokens, a document (or its
part in the block) gives consecutive chunks of L tokens from its start; the tails and the documents shorter than L are
joined in order, with an end token after each that does not go on in the next block, and the result is cut into chunks
of L as well. What is left of it, less than L tokens a block, is not shown in that epoch; where it lies changes from
epoch to epoch. A block that gives no whole chunk gives a short one.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

DOCUMENTS_AT_ONCE = 1 << 18  # bounds the memory for counting


@dataclass(frozen=True)
class Chunk:
    """The text of one sample: pieces of the set's axis."""

    starts: NDArray[np.int64]
    """(pieces,) position of the first token of each piece."""
    stops: NDArray[np.int64]
    """(pieces,) position after the last token of each piece."""
    ended: NDArray[np.bool_]
    """(pieces,) whether an end token follows the piece."""

    @property
    def num_tokens(self) -> int:
        """Tokens of the text, end tokens included."""
        return int((self.stops - self.starts).sum()) + int(self.ended.sum())


class BlockLayout:
    """The chunks of one block for one raw length."""

    def __init__(
        self, starts: NDArray[np.int64], lengths: NDArray[np.int64], raw_tokens: int, *, last_goes_on: bool
    ) -> None:
        """Lay out the parts of documents that begin at `starts` and have `lengths` tokens.

        The document of the last part goes on in the next block if `last_goes_on`; the others end with their parts.
        """
        self._raw_tokens = raw_tokens
        self._starts = starts
        whole = lengths // raw_tokens
        self._whole_ends = np.cumsum(whole)
        tails = lengths - whole * raw_tokens
        kept = tails > 0
        self._tail_starts = (starts + whole * raw_tokens)[kept]
        self._end_tokens = kept[kept].astype(np.int64)  # after each tail
        if last_goes_on and kept[-1]:
            self._end_tokens[-1] = 0
        self._tail_ends = np.cumsum(tails[kept] + self._end_tokens)  # in the joined text
        self._num_whole = int(whole.sum())
        self._joined_tokens = int(self._tail_ends[-1]) if len(self._tail_ends) else 0
        self.num_chunks = max(self._num_whole + self._joined_tokens // raw_tokens, min(1, len(lengths)))

    @property
    def num_offsets(self) -> int:
        """Places where the joined text's first chunk may begin."""
        return self._joined_tokens % self._raw_tokens + 1 if self._joined_tokens >= self._raw_tokens else 1

    def chunk(self, number: int, offset: int) -> Chunk:
        """Chunk `number` of the block, when the joined text is cut from `offset` < num_offsets on."""
        assert 0 <= number < self.num_chunks and 0 <= offset < self.num_offsets, (number, offset)
        if number < self._num_whole:
            part = int(self._whole_ends.searchsorted(number, side="right"))
            before = int(self._whole_ends[part - 1]) if part else 0
            start = int(self._starts[part]) + (number - before) * self._raw_tokens
            return Chunk(np.array([start]), np.array([start + self._raw_tokens]), np.array([False]))
        begin = offset + (number - self._num_whole) * self._raw_tokens
        end = min(begin + self._raw_tokens, self._joined_tokens)
        first = int(self._tail_ends.searchsorted(begin, side="right"))
        last = int(self._tail_ends.searchsorted(end, side="left"))
        ends = self._tail_ends[first : last + 1]
        begins = np.empty_like(ends)
        begins[0] = self._tail_ends[first - 1] if first else 0
        begins[1:] = ends[:-1]
        # from places in the joined text to places on the axis
        shift = self._tail_starts[first : last + 1] - begins
        end_tokens = self._end_tokens[first : last + 1]
        stops = np.minimum(ends - end_tokens, end) + shift
        return Chunk(np.maximum(begins, begin) + shift, stops, (ends <= end) & (end_tokens > 0))


class Blocks:
    """The blocks of a shard set, and how many chunks each gives for each raw length."""

    def __init__(
        self,
        document_ends: NDArray[np.int64],
        block_tokens: int,
        raw_lengths: tuple[int, ...],
        *,
        min_document_tokens: int = 0,
    ) -> None:
        """Cut the set.

        Args:
            document_ends: (documents,) ends of the documents on the set's axis.
            block_tokens: about so many tokens are a block.
            raw_lengths: raw tokens of a sample, an objective each.
            min_document_tokens: documents of fewer tokens give nothing.
        """
        self._document_ends = document_ends
        self._raw_lengths = raw_lengths
        self._min_document_tokens = min_document_tokens
        self.bounds = _cut(document_ends, block_tokens)
        # whether the last document of each block goes on in the next
        self._goes_on = document_ends[np.searchsorted(document_ends, self.bounds[1:], side="left")] != self.bounds[1:]
        self.counts = self._count()

    @property
    def num_blocks(self) -> int:
        """Blocks of the set."""
        return len(self.bounds) - 1

    def layout(self, block: int, objective: int) -> BlockLayout:
        """The chunks of one block for the raw length of one objective."""
        starts, stops, kept = self._parts(block, block + 1)
        return BlockLayout(
            starts[kept],
            (stops - starts)[kept],
            self._raw_lengths[objective],
            last_goes_on=bool(self._goes_on[block] and kept[-1]),
        )

    def _parts(self, first: int, last: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
        """Starts and stops of the documents' parts in blocks first..last-1, and which of them are not left out."""
        ends = self._document_ends
        begin, end = int(self.bounds[first]), int(self.bounds[last])
        first_document = int(np.searchsorted(ends, begin, side="right"))
        last_document = int(np.searchsorted(ends, end - 1, side="right"))
        stops = np.array(ends[first_document : last_document + 1])
        document_begin = int(ends[first_document - 1]) if first_document else 0
        kept = np.diff(stops, prepend=document_begin) >= self._min_document_tokens
        stops[-1] = end
        # bounds inside a document cut it
        inner = self.bounds[first + 1 : last]
        places = np.searchsorted(stops, inner, side="left")
        cutting = stops[places] != inner
        kept = np.insert(kept, places[cutting], kept[places[cutting]])
        stops = np.insert(stops, places[cutting], inner[cutting])
        return np.concatenate(([begin], stops[:-1])), stops, kept

    def _count(self) -> NDArray[np.int64]:
        """(blocks, objectives) chunks."""
        counts = np.zeros((self.num_blocks, len(self._raw_lengths)), dtype=np.int64)
        step = max(1, DOCUMENTS_AT_ONCE * self.num_blocks // max(1, len(self._document_ends)))
        for first in range(0, self.num_blocks, step):
            last = min(first + step, self.num_blocks)
            starts, stops, kept = self._parts(first, last)
            # 32 bits hold a part and divide faster
            lengths = np.where(kept, stops - starts, 0).astype(np.uint32)
            block_starts = np.searchsorted(starts, self.bounds[first:last], side="left")
            last_parts = np.append(block_starts[1:], len(starts)) - 1
            any_kept = np.logical_or.reduceat(kept, block_starts)
            for objective, raw_tokens in enumerate(self._raw_lengths):
                whole = lengths // np.uint32(raw_tokens)
                tails = lengths - whole * np.uint32(raw_tokens)
                joined = np.add.reduceat(tails + (tails > 0), block_starts, dtype=np.int64)
                joined -= self._goes_on[first:last] & (tails[last_parts] > 0)
                total = np.add.reduceat(whole, block_starts, dtype=np.int64) + joined // raw_tokens
                counts[first:last, objective] = np.maximum(total, any_kept)
        return counts


def _cut(document_ends: NDArray[np.int64], block_tokens: int) -> NDArray[np.int64]:
    """(blocks + 1,) bounds of equal blocks, each moved to the nearest end of a document within a quarter of a block."""
    num_tokens = int(document_ends[-1])
    num_blocks = max(1, round(num_tokens / block_tokens))
    bounds = np.linspace(0, num_tokens, num_blocks + 1).astype(np.int64)
    inner = bounds[1:-1]
    after = np.searchsorted(document_ends, inner, side="left")
    ends, earlier_ends = document_ends[after], document_ends[np.maximum(after - 1, 0)]
    nearest = np.where(np.abs(earlier_ends - inner) < ends - inner, earlier_ends, ends)
    near = np.abs(nearest - inner) <= num_tokens // num_blocks // 4
    bounds[1:-1] = np.where(near, nearest, inner)
    return bounds
