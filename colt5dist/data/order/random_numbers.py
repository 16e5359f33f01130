"""Counter-based random numbers: every draw is a pure function of (seed, item, stream), on every machine.

Only the raw output of the Philox generator (Salmon et al. 2011) is used, which NumPy keeps the same in all versions;
what Generator methods make of it may change with NumPy. The modulo's bias is below 2^-40 for the ranges met here.
"""

from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

BLOCK = 64  # numbers that Draws draws at once


class Stream(IntEnum):
    """What the numbers are for; streams never overlap."""

    DENOISE = 1
    DEAL = 2
    WINDOWS = 3
    CHUNKS = 4
    OFFSET = 5
    SURPLUS = 6
    SOURCES = 7


def random_bits(seed: int, item: int, stream: Stream, part: int = 0) -> np.random.Philox:
    """The generator of (seed, item, stream, part); each call starts it anew."""
    # arrays of the right type: NumPy would take a list with a number above 2^63 for floats
    key = np.array([seed % (1 << 64), item], dtype=np.uint64)
    return np.random.Philox(counter=np.array([0, 0, part, stream], dtype=np.uint64), key=key)


class Draws:
    """What random_bits gives, for one (seed, item, stream) after the other: a generator that is started anew costs less
    than a new one, and numbers drawn in blocks less than a few at a time. The numbers are the same."""

    def __init__(self) -> None:
        """Begin with `restart`."""
        self._bits = np.random.Philox(key=0)
        self._state = self._bits.state
        self._block = np.empty(0, dtype=np.uint64)
        self._place = 0

    def restart(self, seed: int, item: int, stream: Stream) -> "Draws":
        """The numbers of random_bits(seed, item, stream) follow."""
        self._state["state"]["counter"][:] = 0, 0, 0, stream
        self._state["state"]["key"][:] = seed % (1 << 64), item
        self._bits.state = self._state
        self._block = self._block[:0]
        self._place = 0
        return self

    def random_raw(self, size: int | None = None) -> Any:
        """The next number, or the `size` next ones, as Philox.random_raw gives them."""
        numbers = self.ahead(1 if size is None else size)
        self._place += len(numbers)
        return numbers[0] if size is None else numbers

    def ahead(self, size: int) -> NDArray[np.uint64]:
        """The `size` next numbers, which stay the next ones."""
        if self._place + size > len(self._block):
            fresh = self._bits.random_raw(max(size, BLOCK))
            self._block = np.concatenate([self._block[self._place :], fresh]) if len(self._block) else fresh
            self._place = 0
        return self._block[self._place : self._place + size]

    def mark_distinct(self, chosen: NDArray[np.bool_], count: int) -> None:
        """Set the entries of `chosen` that are the first `count` distinct values of the next numbers modulo its length:
        in one go what the loop of `subset` does, with the same numbers used up."""
        drawn = count + count // 2 + 8
        while True:
            # as int64, by which NumPy indexes faster
            values = (self.ahead(drawn) % np.uint64(len(chosen))).view(np.int64)
            order = np.arange(drawn)
            first = np.empty(len(chosen), dtype=np.int64)  # where each value comes first; of those that come
            first[values[::-1]] = order[::-1]
            first_places = first[values]
            # NumPy does not promise that the last assignment to a place is the one that stays
            assert not np.count_nonzero(first_places > order), "this NumPy assigns in another order"
            distinct = (first_places == order).nonzero()[0]
            if len(distinct) >= count:
                break
            drawn *= 2
        used = int(distinct[count - 1]) + 1
        chosen[values[:used]] = True
        self._place += used


Bits = np.random.Philox | Draws


def permutation(bits: Bits, size: int) -> NDArray[np.int64]:
    """A uniform permutation of 0..size-1."""
    return np.argsort(bits.random_raw(size), kind="stable")


def below(bits: Bits, limit: int) -> int:
    """A uniform number in 0..limit-1."""
    return int(bits.random_raw()) % limit


def subset(bits: Bits, size: int, count: int) -> NDArray[np.int64]:
    """A uniform subset of `count` of the numbers 0..size-1, ascending.

    The first `count` distinct values of independent uniform draws are such a subset; drawing only as many as are still
    missing never oversteps it. Where more than half are chosen, the others are drawn.
    """
    assert 0 <= count <= size, (count, size)
    drawn = min(count, size - count)
    chosen = np.zeros(size, dtype=bool)
    if isinstance(bits, Draws) and drawn:
        bits.mark_distinct(chosen, drawn)
    else:
        missing = drawn
        while missing:
            chosen[bits.random_raw(missing) % np.uint64(size)] = True
            missing = drawn - int(np.count_nonzero(chosen))
    return (chosen if drawn == count else ~chosen).nonzero()[0]
