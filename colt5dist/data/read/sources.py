"""Mixes several shard sets: (seed, i) decides the set of sample i, and each set gets samples by its weight."""

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
"""Number of samples in a round. Every round has the same number from each set: the weights rounded to 1/ROUND."""


@dataclass(frozen=True)
class Sources:
    """The shard sets that a run reads."""

    parts: tuple[ShardSet, ...]
    """One or more shard sets, made with the same tokenizer."""
    weights: tuple[float, ...]
    """Share of the samples that comes from each, relative to the other weights."""

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the ids."""
        return self.parts[0].tokenizer

    @property
    def fingerprint(self) -> str:
        """Hash of the shard sets and their shares."""
        if len(self.parts) == 1:
            return self.parts[0].fingerprint
        content = [[part.fingerprint, share] for part, share in zip(self.parts, shares(self.weights), strict=True)]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    @property
    def validation(self) -> "Sources":
        """The held-out documents, mixed by the same weights."""
        return Sources(tuple(part.validation for part in self.parts), self.weights)

    def passes(self, num_tokens: int) -> list[float]:
        """Return how often each set is read from start to end, by samples with `num_tokens` tokens of text in all."""
        parts = zip(self.parts, shares(self.weights), strict=True)
        return [num_tokens * share / ROUND / part.num_tokens for part, share in parts]


def as_sources(shards: ShardSet | Sources) -> Sources:
    """Return one shard set as `Sources`; several are returned unchanged."""
    return shards if isinstance(shards, Sources) else Sources((shards,), (1.0,))


def shares(weights: Sequence[float]) -> list[int]:
    """Return the number of samples of each set per round of ROUND samples.

    They are proportional to the weights, at least 1, and rounded by the largest remainders.
    """
    exact = np.array(weights) / np.sum(weights) * ROUND
    counts = np.maximum(np.floor(exact).astype(np.int64), 1)
    for place in np.argsort(counts - exact, kind="stable")[: max(0, ROUND - int(counts.sum()))]:
        counts[place] += 1
    counts[np.argmax(counts)] -= counts.sum() - ROUND
    return counts.tolist()


class Interleave:
    """Decides which set a sample comes from, and its number in the order of that set.

    Args:
        weights: weights of the sets.
        seed: seed of the order.
    """

    def __init__(self, weights: Sequence[float], *, seed: int) -> None:
        self._seed = seed
        self._shares = shares(weights)
        self._round = lru_cache(maxsize=4)(self._make_round)

    def find(self, number: int) -> tuple[int, int]:
        """Return the number of the set, and the number of the sample in the order of that set."""
        if len(self._shares) == 1:
            return 0, number
        rounds, place = divmod(number, ROUND)
        order, ranks = self._round(rounds)
        source = int(order[place])
        return source, rounds * self._shares[source] + int(ranks[place])

    def _make_round(self, number: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(ROUND,) the set of every sample of a round, and (ROUND,) its number of earlier samples in the round."""
        order = np.repeat(np.arange(len(self._shares)), self._shares)
        order = order[permutation(random_bits(self._seed, number, Stream.SOURCES), ROUND)]
        ranks = np.empty(ROUND, dtype=np.int64)
        for source, share in enumerate(self._shares):
            ranks[order == source] = np.arange(share)
        return order, ranks
