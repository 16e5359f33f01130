"""Samples that a run leaves out (data.skip).

A run continues from a sample number, so ranges before that number have no effect.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


class SkipList:
    """Ranges of sample numbers that are left out.

    Args:
        ranges: pairs [first, sample after the last] in any order; they may overlap.
    """

    def __init__(self, ranges: Sequence[Sequence[int]]) -> None:
        self._ranges: list[list[int]] = []
        for first, stop in sorted((part[0], part[1]) for part in ranges):
            if self._ranges and first <= self._ranges[-1][1]:
                self._ranges[-1][1] = max(self._ranges[-1][1], stop)
            else:
                self._ranges.append([first, stop])

    def take(self, first: int, count: int) -> NDArray[np.int64]:
        """Return the first `count` numbers from `first` on that are in no range, (count,), in ascending order."""
        parts = []
        for begin, stop in self._ranges:
            if count and stop > first:
                free = min(max(begin - first, 0), count)
                parts.append(np.arange(first, first + free))
                count -= free
                first = stop if count else first + free
        return np.concatenate([*parts, np.arange(first, first + count)])

    def passed(self, first: int, stop: int) -> list[list[int]]:
        """Return the ranges, or their parts, within first..stop-1."""
        return [[max(a, first), min(b, stop)] for a, b in self._ranges if a < stop and b > first]
