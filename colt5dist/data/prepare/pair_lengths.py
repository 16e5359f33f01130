"""How long the inputs and targets of a pair set are, counted when it is made, so that a run can say what it cuts."""

from collections.abc import Mapping

STEPS = 16
"""Lengths up to this number are counted one by one; above, each doubling has this number of bins."""


class PairLengths:
    """Counts lengths in tokens, in bins that are at most 1/STEPS of the length wide.

    Args:
        counts: smallest length of a bin, as text (it is written as JSON) -> number of lengths in it.
    """

    def __init__(self, counts: Mapping[str, int] | None = None) -> None:
        self.counts = {int(begin): number for begin, number in (counts or {}).items()}

    def add(self, length: int) -> None:
        """Count a length."""
        begin = length - length % _width(length)
        self.counts[begin] = self.counts.get(begin, 0) + 1

    def save(self) -> dict[str, int]:
        """Return the `counts` to continue with, in the order of the lengths."""
        return {str(begin): self.counts[begin] for begin in sorted(self.counts)}

    def above(self, limit: int) -> tuple[int, bool]:
        """Count the lengths that are larger than a limit.

        Args:
            limit: a number of tokens.

        Returns:
            The number of lengths in bins that reach above the limit, and whether it is exact: no bin is cut by it.
        """
        reaching = {begin: number for begin, number in self.counts.items() if begin + _width(begin) - 1 > limit}
        return sum(reaching.values()), all(begin > limit for begin in reaching)

    @property
    def total(self) -> int:
        """Number of lengths."""
        return sum(self.counts.values())

    def mean(self, limit: int) -> float:
        """Return about the mean of the lengths, with larger ones counted as `limit`; 0 where there is none."""
        found = sum(min(begin + (_width(begin) - 1) / 2, limit) * number for begin, number in self.counts.items())
        return found / max(self.total, 1)

    def quantile(self, share: float) -> int:
        """Return a length that about this share of the lengths does not exceed; 0 where there is none."""
        wanted, seen = share * self.total, 0
        for begin in sorted(self.counts):
            seen += self.counts[begin]
            if seen >= wanted:
                return begin + _width(begin) // 2
        return 0


def _width(length: int) -> int:
    """Width of the bin of a length: a power of two."""
    return 1 << max(0, length.bit_length() - STEPS.bit_length())
