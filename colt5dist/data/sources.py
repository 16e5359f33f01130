"""Several shard sets as one: sample i comes from the set that (seed, i) says, each set as often as its weight asks."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from colt5dist.data.config import DataConfig
from colt5dist.data.philox import Stream, permutation, random_bits
from colt5dist.data.shards import ShardSet, open_shards
from colt5dist.data.standard_library import STANDARD_LIBRARY, ensure_standard_library_shards
from colt5dist.data.tokenizer import Tokenizer
from colt5dist.errors import ConfigError

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


def open_sources(config: DataConfig) -> Sources:
    """Open the shard sets of a configuration; the standard library's are made where they are missing.

    Raises:
        ConfigError: one is missing or damaged, or they do not go together.
    """
    named = [(source.shards, source.weight) for source in config.sources] or [(config.shards, 1.0)]
    cache_bytes = int(config.cache_gb * 1e9)
    parts = [
        open_shards(
            ensure_standard_library_shards() if shards == STANDARD_LIBRARY else _path(shards), cache_bytes=cache_bytes
        )
        for shards, _ in named
    ]
    first = parts[0].tokenizer.fingerprint
    for number, part in enumerate(parts):
        if part.tokenizer.fingerprint != first:
            raise ConfigError(
                f"data.sources[{number}].shards: {named[number][0]} was made with another tokenizer than "
                f"{named[0][0]}; prepare it with the same"
            )
    return Sources(tuple(parts), tuple(weight for _, weight in named))


def _path(shards: str) -> str | Path:
    return shards if "://" in shards else Path(shards)


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
