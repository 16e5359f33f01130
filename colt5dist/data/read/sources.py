"""Mixes several shard sets: (seed, i) decides the set of sample i, and each set gets samples by its weight."""

import hashlib
import json
import math
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
SETS_OF_ROUND = 256
"""Number of shard sets up to which a round has ROUND samples; more sets need longer rounds."""


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

    def passes_of_pairs(self, num_samples: int) -> list[float]:
        """Return how often each set of pairs is read, by `num_samples` samples in all."""
        counts = shares(self.weights)
        parts = zip(self.parts, counts, strict=True)
        return [num_samples * share / sum(counts) / part.num_documents for part, share in parts]

    def passes(self, num_tokens: int) -> list[float]:
        """Return how often each set is read from start to end, by samples with `num_tokens` tokens of text in all."""
        counts = shares(self.weights)
        parts = zip(self.parts, counts, strict=True)
        return [num_tokens * share / sum(counts) / part.num_tokens for part, share in parts]


def as_sources(shards: ShardSet | Sources) -> Sources:
    """Return one shard set as `Sources`; several are returned unchanged."""
    return shards if isinstance(shards, Sources) else Sources((shards,), (1.0,))


def shares(weights: Sequence[float]) -> list[int]:
    """Return the number of samples of each set per round.

    They are proportional to the weights, at least 1, and rounded by the largest remainders. A round has ROUND samples,
    and as many more for every further SETS_OF_ROUND sets.
    """
    length = ROUND * -(-len(weights) // SETS_OF_ROUND)
    relative = np.array(weights, dtype=np.float64)
    if math.fsum(weight / len(weights) for weight in weights) > 1e300:
        relative /= max(weights)  # or their sum would be infinite
    single = np.zeros(len(weights), dtype=bool)  # sets that get one sample although their share is smaller
    while True:
        left = length - int(single.sum())  # at least one set keeps more than its part of the round
        exact = np.where(single, 1.0, relative / relative[~single].sum() * left)
        if not (exact < 1).any():
            break
        single |= exact < 1
    counts = np.floor(exact).astype(np.int64)
    for place in np.argsort(counts - exact, kind="stable")[: length - int(counts.sum())]:
        counts[place] += 1
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
        self._length = sum(self._shares)
        self._round = lru_cache(maxsize=4)(self._make_round)

    def find(self, number: int) -> tuple[int, int]:
        """Return the number of the set, and the number of the sample in the order of that set."""
        if len(self._shares) == 1:
            return 0, number
        rounds, place = divmod(number, self._length)
        order, ranks = self._round(rounds)
        source = int(order[place])
        return source, rounds * self._shares[source] + int(ranks[place])

    def _make_round(self, number: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(samples,) the set of every sample of a round, and (samples,) its number of earlier samples in the round."""
        order = np.repeat(np.arange(len(self._shares)), self._shares)
        order = order[permutation(random_bits(self._seed, number, Stream.SOURCES), self._length)]
        ranks = np.empty(self._length, dtype=np.int64)
        first = np.cumsum(self._shares) - self._shares
        ranks[np.argsort(order, kind="stable")] = np.arange(self._length) - np.repeat(first, self._shares)
        return order, ranks
