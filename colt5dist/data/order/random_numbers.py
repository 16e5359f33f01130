"""Counter-based random numbers: every number is a pure function of (seed, item, stream), on every machine.

Only the raw output of the Philox generator (Salmon et al. 2011) is used, which is the same in all versions of NumPy.
The numbers of NumPy's Generator methods may change between versions. The bias of the modulo is below 2^-40 for the
ranges used here.
"""

from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

BLOCK = 64  # numbers that Draws generates at once


class Stream(IntEnum):
    """What the numbers are used for. Streams never overlap. The values must not change, since they decide the order."""

    DENOISE = 1
    DEAL = 2
    WINDOWS = 3
    CHUNKS = 4
    OFFSET = 5
    SURPLUS = 6
    SOURCES = 7


def random_bits(seed: int, item: int, stream: Stream, part: int = 0) -> np.random.Philox:
    """Return the generator of (seed, item, stream, part), at its start.

    Args:
        seed: seed of the run; it is taken modulo 2^64.
        item: for instance the number of a sample or an epoch, 0 or more.
        stream: what the numbers are used for.
        part: a further number, where one item needs several generators.
    """
    # arrays with a dtype: NumPy would convert a list with a number above 2^63 to floats
    key = np.array([seed % (1 << 64), item], dtype=np.uint64)
    return np.random.Philox(counter=np.array([0, 0, part, stream], dtype=np.uint64), key=key)


class Draws:
    """The numbers of `random_bits`, but faster where many (seed, item, stream) are used one after the other.

    Restarting a generator costs less than making a new one, and generating numbers in blocks costs less than a few at a
    time. The first call must be `restart`.
    """

    def __init__(self) -> None:
        self._bits = np.random.Philox(key=0)
        self._state = self._bits.state
        self._block = np.empty(0, dtype=np.uint64)
        self._place = 0

    def restart(self, seed: int, item: int, stream: Stream) -> "Draws":
        """Start with the numbers of random_bits(seed, item, stream); return this object."""
        self._state["state"]["counter"][:] = 0, 0, 0, stream
        self._state["state"]["key"][:] = seed % (1 << 64), item
        self._bits.state = self._state
        self._block = self._block[:0]
        self._place = 0
        return self

    def random_raw(self, size: int | None = None) -> Any:
        """Return the next number, or the next `size` numbers, like Philox.random_raw."""
        numbers = self.ahead(1 if size is None else size)
        self._place += len(numbers)
        return numbers[0] if size is None else numbers

    def ahead(self, size: int) -> NDArray[np.uint64]:
        """Return the next `size` numbers without using them up."""
        if self._place + size > len(self._block):
            fresh = self._bits.random_raw(max(size, BLOCK))
            self._block = np.concatenate([self._block[self._place :], fresh]) if len(self._block) else fresh
            self._place = 0
        return self._block[self._place : self._place + size]

    def mark_distinct(self, chosen: NDArray[np.bool_], count: int) -> None:
        """Do in one step what the loop of `subset` does, and use up the same numbers.

        Args:
            chosen: (size,) the entries at the first `count` distinct values of the next numbers, modulo size, are set.
            count: number of entries to set.
        """
        drawn = count + count // 2 + 8
        while True:
            # as int64, with which NumPy indexes faster
            values = (self.ahead(drawn) % np.uint64(len(chosen))).view(np.int64)
            order = np.arange(drawn)
            first = np.empty(len(chosen), dtype=np.int64)  # place where each drawn value occurs first
            first[values[::-1]] = order[::-1]
            first_places = first[values]
            # NumPy does not guarantee that of several assignments to one place the last one counts
            assert not np.count_nonzero(first_places > order), "this NumPy version assigns in another order"
            distinct = (first_places == order).nonzero()[0]
            if len(distinct) >= count:
                break
            drawn *= 2
        used = int(distinct[count - 1]) + 1
        chosen[values[:used]] = True
        self._place += used


Bits = np.random.Philox | Draws


def permutation(bits: Bits, size: int) -> NDArray[np.int64]:
    """Return a uniformly random permutation of 0..size-1."""
    return np.argsort(bits.random_raw(size), kind="stable")


def below(bits: Bits, limit: int) -> int:
    """Return a uniformly random number in 0..limit-1."""
    return int(bits.random_raw()) % limit


def subset(bits: Bits, size: int, count: int) -> NDArray[np.int64]:
    """Return a uniformly random subset of `count` of the numbers 0..size-1, in ascending order.

    The first `count` distinct values of independent uniform draws are such a subset. Each round draws as many numbers
    as are still missing, so there are never too many. If more than half are to be chosen, the others are drawn instead.
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
