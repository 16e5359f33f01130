"""Samples that a run passes over: its place is a number in the run's order, so ranges that it has passed do nothing."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


class SkipList:
    """Ranges of sample numbers."""

    def __init__(self, ranges: Sequence[Sequence[int]]) -> None:
        """Take ranges [first, sample after the last] in any order; they may overlap."""
        self._ranges: list[list[int]] = []
        for first, stop in sorted((part[0], part[1]) for part in ranges):
            if self._ranges and first <= self._ranges[-1][1]:
                self._ranges[-1][1] = max(self._ranges[-1][1], stop)
            else:
                self._ranges.append([first, stop])

    def take(self, first: int, count: int) -> NDArray[np.int64]:
        """The `count` next numbers from `first` on that are in no range, ascending."""
        parts = []
        for begin, stop in self._ranges:
            if count and stop > first:
                free = min(max(begin - first, 0), count)
                parts.append(np.arange(first, first + free))
                count -= free
                first = stop if count else first + free
        return np.concatenate([*parts, np.arange(first, first + count)])

    def passed(self, first: int, stop: int) -> list[list[int]]:
        """The ranges, or parts of them, between the numbers `first` and `stop`."""
        return [[max(a, first), min(b, stop)] for a, b in self._ranges if a < stop and b > first]
