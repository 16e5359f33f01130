"""Cuts a shard set into blocks of neighbouring documents, and a block into the texts of its samples.

A block is a range of about `block_tokens` tokens on the set's axis (data/index.py). It ends at the end of a document if
there is one nearby; otherwise a long document continues in the next block. For an objective that takes L raw tokens, a
document (or its part in the block) is cut into consecutive chunks of L tokens from its start. The tails, and the
documents shorter than L, are joined in order, with an end token after each one that does not continue in the next
block; this joined text is cut into chunks of L tokens as well. Its remainder, less than L tokens per block, is not
shown in that epoch; which tokens these are changes from epoch to epoch. A block with text but without a full chunk
gives one short chunk.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

DOCUMENTS_AT_ONCE = 1 << 18  # limits the memory for counting


@dataclass(frozen=True)
class Chunk:
    """The text of one sample: ranges on the set's axis."""

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

    def documents_at(
        self, places: NDArray[np.int64], document_ends: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Find the documents that tokens of the text belong to; an end token belongs to the one that it ends.

        Args:
            places: (tokens,) numbers of tokens of the text, below num_tokens.
            document_ends: (documents,) positions after the documents on the set's axis.

        Returns:
            Two (tokens,) arrays: tokens of the document, and position of the token in it.
        """
        ends = np.cumsum(self.stops - self.starts + self.ended)
        piece = np.searchsorted(ends, places, side="right")
        begins = np.concatenate(([0], ends[:-1]))
        position = np.minimum(self.starts[piece] + places - begins[piece], self.stops[piece] - 1)
        document = np.searchsorted(document_ends, position, side="right")
        document_starts = np.where(document > 0, document_ends[document - 1], 0)
        return document_ends[document] - document_starts, position - document_starts


class BlockLayout:
    """The chunks of one block for one raw length.

    Args:
        starts: (parts,) positions of the first tokens of the documents' parts in the block.
        lengths: (parts,) tokens of each part.
        raw_tokens: tokens per chunk.
        last_continues: whether the document of the last part continues in the next block; the others end in this one.
    """

    def __init__(
        self, starts: NDArray[np.int64], lengths: NDArray[np.int64], raw_tokens: int, *, last_continues: bool
    ) -> None:
        self._raw_tokens = raw_tokens
        self._starts = starts
        whole = lengths // raw_tokens
        self._whole_ends = np.cumsum(whole)
        tails = lengths - whole * raw_tokens
        kept = tails > 0
        self._tail_starts = (starts + whole * raw_tokens)[kept]
        self._end_tokens = kept[kept].astype(np.int64)  # after each tail
        if last_continues and kept[-1]:
            self._end_tokens[-1] = 0
        self._tail_ends = np.cumsum(tails[kept] + self._end_tokens)  # in the joined text
        self._num_whole = int(whole.sum())
        self._joined_tokens = int(self._tail_ends[-1]) if len(self._tail_ends) else 0
        self.num_chunks = max(self._num_whole + self._joined_tokens // raw_tokens, min(1, len(lengths)))

    @property
    def num_offsets(self) -> int:
        """Number of positions where the first chunk of the joined text may begin."""
        return self._joined_tokens % self._raw_tokens + 1 if self._joined_tokens >= self._raw_tokens else 1

    def chunk(self, number: int, offset: int) -> Chunk:
        """Return a chunk of the block.

        Args:
            number: number of the chunk, below num_chunks.
            offset: tokens before the first chunk of the joined text, below num_offsets.
        """
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
        # from positions in the joined text to positions on the axis
        shift = self._tail_starts[first : last + 1] - begins
        end_tokens = self._end_tokens[first : last + 1]
        stops = np.minimum(ends - end_tokens, end) + shift
        return Chunk(np.maximum(begins, begin) + shift, stops, (ends <= end) & (end_tokens > 0))


class Blocks:
    """The blocks of a shard set, and the number of chunks that each gives for each raw length.

    Args:
        document_ends: (documents,) positions after the documents on the set's axis.
        block_tokens: approximate tokens per block.
        raw_lengths: raw tokens of a sample, for each objective.
        min_document_tokens: documents with fewer tokens are left out.
    """

    def __init__(
        self,
        document_ends: NDArray[np.int64],
        block_tokens: int,
        raw_lengths: tuple[int, ...],
        *,
        min_document_tokens: int = 0,
    ) -> None:
        self._document_ends = document_ends
        self._raw_lengths = raw_lengths
        self._min_document_tokens = min_document_tokens
        self.bounds = _cut(document_ends, block_tokens)
        # whether the last document of each block continues in the next
        self._continues = document_ends[np.searchsorted(document_ends, self.bounds[1:], side="left")] != self.bounds[1:]
        self.counts = self._count()

    @property
    def num_blocks(self) -> int:
        """Number of blocks in the set."""
        return len(self.bounds) - 1

    def layout(self, block: int, objective: int) -> BlockLayout:
        """Return the chunks of one block for the raw length of one objective."""
        starts, stops, kept = self._parts(block, block + 1)
        return BlockLayout(
            starts[kept],
            (stops - starts)[kept],
            self._raw_lengths[objective],
            last_continues=bool(self._continues[block] and kept[-1]),
        )

    def _parts(self, first: int, last: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
        """Starts and stops of the documents' parts in blocks first..last-1, and which parts are not left out."""
        ends = self._document_ends
        begin, end = int(self.bounds[first]), int(self.bounds[last])
        first_document = int(np.searchsorted(ends, begin, side="right"))
        last_document = int(np.searchsorted(ends, end - 1, side="right"))
        stops = np.array(ends[first_document : last_document + 1])
        document_begin = int(ends[first_document - 1]) if first_document else 0
        kept = np.diff(stops, prepend=document_begin) >= self._min_document_tokens
        stops[-1] = end
        # a bound inside a document splits it into parts
        inner = self.bounds[first + 1 : last]
        places = np.searchsorted(stops, inner, side="left")
        cutting = stops[places] != inner
        kept = np.insert(kept, places[cutting], kept[places[cutting]])
        stops = np.insert(stops, places[cutting], inner[cutting])
        return np.concatenate(([begin], stops[:-1])), stops, kept

    def _count(self) -> NDArray[np.int64]:
        """(blocks, objectives) number of chunks."""
        counts = np.zeros((self.num_blocks, len(self._raw_lengths)), dtype=np.int64)
        step = max(1, DOCUMENTS_AT_ONCE * self.num_blocks // max(1, len(self._document_ends)))
        for first in range(0, self.num_blocks, step):
            last = min(first + step, self.num_blocks)
            starts, stops, kept = self._parts(first, last)
            # 32 bits are enough for a part, and divide faster
            lengths = np.where(kept, stops - starts, 0).astype(np.uint32)
            block_starts = np.searchsorted(starts, self.bounds[first:last], side="left")
            last_parts = np.append(block_starts[1:], len(starts)) - 1
            any_kept = np.logical_or.reduceat(kept, block_starts)
            for objective, raw_tokens in enumerate(self._raw_lengths):
                whole = lengths // np.uint32(raw_tokens)
                tails = lengths - whole * np.uint32(raw_tokens)
                joined = np.add.reduceat(tails + (tails > 0), block_starts, dtype=np.int64)
                joined -= self._continues[first:last] & (tails[last_parts] > 0)
                total = np.add.reduceat(whole, block_starts, dtype=np.int64) + joined // raw_tokens
                counts[first:last, objective] = np.maximum(total, any_kept)
        return counts


def _cut(document_ends: NDArray[np.int64], block_tokens: int) -> NDArray[np.int64]:
    """(blocks + 1,) bounds of equal blocks; each is moved to the nearest document end within a quarter of a block."""
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
