"""Small shard sets for the tests of the data room."""

import random
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from colt5dist.data.prepare.held_out_split import CorpusWriter
from colt5dist.data.read.shards import ShardSet, open_shards
from colt5dist.data.tokenizer import ByteTokenizer, Tokenizer

MakeShards = Callable[..., ShardSet]


@pytest.fixture(scope="session")
def make_shards(tmp_path_factory: pytest.TempPathFactory) -> MakeShards:
    """A function that writes documents to a new folder and opens it."""

    def make(
        documents: Iterable[str],
        *,
        tokenizer: Tokenizer | None = None,
        validation_fraction: float = 0.05,
        shard_bytes: int = 1 << 19,
        folder: Path | None = None,
    ) -> ShardSet:
        folder = folder or tmp_path_factory.mktemp("shards")
        writer = CorpusWriter(
            folder, tokenizer or ByteTokenizer(), validation_fraction=validation_fraction, shard_bytes=shard_bytes
        )
        for document in documents:
            writer.add(document)
        writer.close({})
        return open_shards(folder)

    return make


@pytest.fixture(scope="session")
def documents(make_text: Callable[[random.Random, int], str]) -> list[str]:
    """Distinct documents: many short ones, some long, one longer than a tar member."""
    rng = random.Random(3)
    lengths = [rng.randint(1, 3000) for _ in range(300)] + [rng.randint(5000, 60000) for _ in range(12)] + [300_000]
    rng.shuffle(lengths)
    return [make_text(rng, length) for length in lengths]


@pytest.fixture(scope="session")
def shards(make_shards: MakeShards, documents: list[str]) -> ShardSet:
    """The documents as a shard set of several shards; tests must not change it."""
    return make_shards(documents)
