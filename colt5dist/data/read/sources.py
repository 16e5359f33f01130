"""Several shard sets as one: sample i comes from the set that (seed, i) says, each set as often as its weight asks."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from colt5dist.data.order.random_numbers import Stream, permutation, random_bits
from colt5dist.data.read.shards import ShardSet
from colt5dist.data.tokenizer import Tokenizer

ROUND = 4096
"""Samples in which every set has exactly its share; weights are rounded to this part of the whole."""


@dataclass(frozen=True)
class Sources:
    """The shard sets that a run reads."""

    parts: tuple[ShardSet, ...]
    """One or more, of one tokenizer."""
    weights: tuple[float, ...]
    """Parts of the samples that each gives."""

    @property
    def tokenizer(self) -> Tokenizer:
        """What made the ids."""
        return self.parts[0].tokenizer

    @property
    def fingerprint(self) -> str:
        """Hash of what is read and how it is mixed."""
        if len(self.parts) == 1:
            return self.parts[0].fingerprint
        content = [[part.fingerprint, share] for part, share in zip(self.parts, shares(self.weights), strict=True)]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    @property
    def validation(self) -> "Sources":
        """The held-out documents, mixed by the same weights."""
        return Sources(tuple(part.validation for part in self.parts), self.weights)

    def passes(self, num_tokens: int) -> list[float]:
        """How often each set is read from end to end by samples of so many tokens of text in all."""
        parts = zip(self.parts, shares(self.weights), strict=True)
        return [num_tokens * share / ROUND / part.num_tokens for part, share in parts]


def as_sources(shards: ShardSet | Sources) -> Sources:
    """One shard set, or several."""
    return shards if isinstance(shards, Sources) else Sources((shards,), (1.0,))


def shares(weights: Sequence[float]) -> list[int]:
    """Samples of each set in a ROUND: in proportion to the weights, at least one, the largest remainders first."""
    exact = np.array(weights) / np.sum(weights) * ROUND
    counts = np.maximum(np.floor(exact).astype(np.int64), 1)
    for place in np.argsort(counts - exact, kind="stable")[: max(0, ROUND - int(counts.sum()))]:
        counts[place] += 1
    counts[np.argmax(counts)] -= counts.sum() - ROUND
    return counts.tolist()


class Interleave:
    """Which set a sample comes from, and its number in that set's own order."""

    def __init__(self, weights: Sequence[float], *, seed: int) -> None:
        """Mix sets of these weights."""
        self._seed = seed
        self._shares = shares(weights)
        self._round = lru_cache(maxsize=4)(self._make_round)

    def find(self, number: int) -> tuple[int, int]:
        """Number of the set, and of the sample in it."""
        if len(self._shares) == 1:
            return 0, number
        rounds, place = divmod(number, ROUND)
        order, ranks = self._round(rounds)
        source = int(order[place])
        return source, rounds * self._shares[source] + int(ranks[place])

    def _make_round(self, number: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The set of every sample of a round, and how many samples of that set come before in the round."""
        order = np.repeat(np.arange(len(self._shares)), self._shares)
        order = order[permutation(random_bits(self._seed, number, Stream.SOURCES), ROUND)]
        ranks = np.empty(ROUND, dtype=np.int64)
        for source, share in enumerate(self._shares):
            ranks[order == source] = np.arange(share)
        return order, ranks
