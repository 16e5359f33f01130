"""Texts of any length to ids, in bounded memory: they are tokenized in windows.

A tokenizer needs some hundred bytes of memory for each byte of a text. A long text is therefore UTF-8 bytes, not a
string, and is tokenized in windows that overlap. The ids of two windows are joined at a place in the overlap where both
have a token boundary: tokens depend on the text near them only, so these are the ids of the whole text.
"""

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from colt5dist.data.tokenizer import JsonTokenizer, Tokenizer

LONG_BYTES = 1 << 22  # a text of more bytes is a long one
WINDOW_BYTES = 1 << 20
OVERLAP_BYTES = 1 << 13


def encode_long(
    tokenizer: Tokenizer, content: bytes, tick: Callable[[float], None] = lambda share: None
) -> NDArray[np.integer]:
    """Return the ids of a long text, (tokens,).

    Args:
        tokenizer: makes the ids.
        content: the text, in UTF-8.
        tick: called after each window with the share of the text that is done.

    Raises:
        ConfigError: the tokenizer has no ids for a part of the text.
    """
    joined = bytearray()  # it grows in place: parts that are joined at the end would need twice the memory
    for ids, end in _windows(tokenizer, content) if isinstance(tokenizer, JsonTokenizer) else _cut(tokenizer, content):
        joined += ids.tobytes()
        tick(end / len(content))
    return np.frombuffer(joined, dtype=tokenizer.dtype)


def _cut(tokenizer: Tokenizer, content: bytes) -> Iterator[tuple[NDArray[np.integer], int]]:
    """(ids, where their text ends) of windows without an overlap, for a tokenizer whose ids are bytes."""
    begin = 0
    while begin < len(content):
        end = character_begin(content, begin + WINDOW_BYTES)
        yield tokenizer.encode(content[begin:end].decode()), end
        begin = end


def _windows(tokenizer: JsonTokenizer, content: bytes) -> Iterator[tuple[NDArray[np.integer], int]]:
    """(ids, where their window ends) of overlapping windows, without the ids that another window has."""
    begin, end = 0, character_begin(content, WINDOW_BYTES)
    ids, starts, ends = tokenizer.encode_with_places(content[:end].decode())
    while end < len(content):
        text_length = len(content[begin:end].decode())
        begin, overlap_end = character_begin(content, end - OVERLAP_BYTES), end
        overlap = len(content[begin:overlap_end].decode())
        end = character_begin(content, begin + WINDOW_BYTES)
        next_ids, next_starts, next_ends = tokenizer.encode_with_places(content[begin:end].decode())
        # positions in the overlap, in characters
        here, there = _boundaries(starts, ends), _boundaries(next_starts, next_ends)
        places = np.intersect1d(starts[here] - (text_length - overlap), next_starts[there])
        places = places[(places >= overlap // 8) & (places <= overlap - overlap // 8)]
        if len(places):
            place = int(places[np.abs(places - overlap // 2).argmin()])
            first = there[np.searchsorted(next_starts[there], place)]
            last = here[np.searchsorted(starts[here], place + text_length - overlap)]
        else:  # no boundary in common: the next window begins where this one ends
            begin, first, last = overlap_end, 0, len(ids)
            end = character_begin(content, begin + WINDOW_BYTES)
            next_ids, next_starts, next_ends = tokenizer.encode_with_places(content[begin:end].decode())
        yield ids[:last], overlap_end
        ids, starts, ends = next_ids[first:], next_starts[first:], next_ends[first:]
    yield ids, end


def _boundaries(starts: NDArray[np.int64], ends: NDArray[np.int64]) -> NDArray[np.int64]:
    """Numbers of the tokens that begin where all tokens before them have ended; their starts are ascending."""
    before = np.maximum.accumulate(ends)
    first = np.flatnonzero(starts[1:] >= before[:-1]) + 1
    return first[np.concatenate([[True], starts[first][1:] > starts[first][:-1]])] if len(first) else first


def character_begin(content: bytes, position: int) -> int:
    """Return the position of the character that the byte at `position` is a part of, or the end of the text."""
    if position >= len(content):
        return len(content)
    while content[position] & 0xC0 == 0x80:
        position -= 1
    return position
