"""Counter-based random numbers: every draw is a pure function of (seed, item, stream), on every machine.

Only the raw output of the Philox generator (Salmon et al. 2011) is used, which NumPy keeps the same in all versions;
what Generator methods make of it may change with NumPy. The modulo's bias is below 2^-40 for the ranges met here.
"""

from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

BLOCK = 512  # numbers that Draws draws at once


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
        count = 1 if size is None else size
        if self._place + count > len(self._block):
            fresh = self._bits.random_raw(max(count, BLOCK))
            self._block = np.concatenate([self._block[self._place :], fresh])
            self._place = 0
        first = self._place
        self._place += count
        return self._block[first] if size is None else self._block[first : self._place]


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
    missing never oversteps it.
    """
    assert 0 <= count <= size, (count, size)
    if 2 * count > size:
        rest = np.ones(size, dtype=bool)
        rest[subset(bits, size, size - count)] = False
        return np.flatnonzero(rest)
    chosen = np.zeros(size, dtype=bool)
    missing = count
    while missing:
        chosen[bits.random_raw(missing) % np.uint64(size)] = True
        missing = count - int(np.count_nonzero(chosen))
    return np.flatnonzero(chosen)
