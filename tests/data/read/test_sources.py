"""Several shard sets: shares by weight, every set in its own order, and samples that are left out."""

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import models

from colt5dist.data.config import DataConfig, SourceConfig
from colt5dist.data.open_shard_sets import open_sources
from colt5dist.data.order.skip import SkipList
from colt5dist.data.read.batch import make_batch
from colt5dist.data.read.held_out import held_out_batches
from colt5dist.data.read.samples import Samples
from colt5dist.data.read.shards import ShardSet
from colt5dist.data.read.sources import ROUND, Interleave, shares
from colt5dist.data.tokenizer import JsonTokenizer
from colt5dist.errors import ConfigError

MakeText = Callable[[random.Random, int], str]


@pytest.fixture(scope="module")
def three(make_shards: Callable[..., ShardSet], make_text: MakeText) -> list[ShardSet]:
    """Three small sets."""
    rng = random.Random(8)
    return [make_shards([make_text(rng, rng.randint(50, 3000)) for _ in range(40)]) for _ in range(3)]


def config(sets: list[ShardSet], weights: list[float]) -> DataConfig:
    """Small samples from all sets."""
    sources = [SourceConfig(str(part.folder), weight) for part, weight in zip(sets, weights, strict=True)]
    return DataConfig(input_length=64, target_length=32, sources=sources)


@given(weights=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=8), seed=st.integers(0, 1 << 31))
def test_interleave(weights: list[float], seed: int) -> None:
    """Each set has its share of every round, and its samples come in order, each once."""
    counts = shares(weights)
    assert sum(counts) == ROUND and min(counts) >= 1
    exact = np.array(weights) / sum(weights) * ROUND
    assert np.abs(counts - exact).max() <= len(weights) + 1
    interleave = Interleave(weights, seed=seed)
    found = [interleave.find(number) for number in range(ROUND - 50, ROUND + 50)]
    for source in {source for source, _ in found}:
        places = [place for which, place in found if which == source]
        assert places == list(range(places[0], places[0] + len(places)))
    assert found == [interleave.find(number) for number in range(ROUND - 50, ROUND + 50)]


@given(
    weights=st.lists(st.floats(1e-300, 1e308, exclude_min=True), min_size=1, max_size=30),
    repeats=st.sampled_from([1, 2, 40, 500]),
)
def test_shares_of_any_weights(weights: list[float], repeats: int) -> None:
    """Up to 15,000 sets: each gets one sample or more, equal weights alike, and no set more than its share."""
    counts = np.array(shares(weights * repeats))
    number = len(weights) * repeats
    assert counts.min() >= 1 and counts.sum() == ROUND * -(-number // 256)
    exact = np.array(weights * repeats) / max(weights) / (np.array(weights) / max(weights)).sum() / repeats
    assert np.all(counts <= np.maximum(np.ceil(exact * counts.sum()) + 1, 1))
    rows = counts.reshape(repeats, -1)
    assert np.ptp(rows, axis=0).max() <= 1


def test_sets_with_tiny_weights_take_from_all_others() -> None:
    """Not from the largest one alone."""
    counts = shares([1e-9] * 1000 + [1.0, 1.0])
    assert counts[:1000] == [1] * 1000 and counts[1000] == counts[1001]


def test_a_round_of_thousands_of_sets() -> None:
    counts = shares([1.0 + number % 3 for number in range(5000)])
    interleave = Interleave([1.0 + number % 3 for number in range(5000)], seed=3)
    found = [interleave.find(number) for number in range(sum(counts), 2 * sum(counts))]
    assert sorted(found) == [(source, share + place) for source, share in enumerate(counts) for place in range(share)]


def test_samples_come_from_their_sets(three: list[ShardSet]) -> None:
    """A sample of the mixture is the sample of its set's own order, with a mask of its own."""
    mixed = config(three, [1, 2, 5])
    sources = open_sources(mixed)
    samples = Samples(sources, mixed, seed=4)
    alone = [Samples(part, config([part], [1]), seed=4) for part in three]
    interleave = Interleave([1, 2, 5], seed=4)
    for number in (0, 1, 2, 500, 5000):
        source, place = interleave.find(number)
        planned, expected = samples.planned(number), alone[source].planned(place)
        assert planned.source == source
        assert np.array_equal(planned.chunk.starts, expected.chunk.starts) and planned.block == expected.block
    assert len(make_batch(samples, range(64))["objective"].unique()) == 4
    assert (
        held_out_batches(sources, mixed, num_samples=12, micro_batch_size=12, rank=0, world_size=1)[0]["input_mask"]
        .any(dim=1)
        .all()
    )


def test_passes_over_each_set(three: list[ShardSet]) -> None:
    passes = open_sources(config(three, [1, 2, 1])).passes(1_000_000)
    read = [number * part.num_tokens for number, part in zip(passes, three, strict=True)]
    assert read == pytest.approx([250_000, 500_000, 250_000])


def test_the_fingerprint_knows_sets_and_weights(three: list[ShardSet]) -> None:
    """One set keeps its own fingerprint; equal proportions give equal ones."""
    assert open_sources(config(three[:1], [3])).fingerprint == three[0].fingerprint
    prints = {open_sources(config(three, list(weights))).fingerprint for weights in ((1, 2, 5), (2, 4, 10), (1, 2, 6))}
    prints.add(open_sources(config(three[::-1], [5, 2, 1])).fingerprint)
    assert len(prints) == 3


def test_wrong_sources_are_named(three: list[ShardSet], make_shards: Callable[..., ShardSet], tmp_path: Path) -> None:
    """Each error names the entry of the list."""
    tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 1, "</s>": 2}, unk_token="a")).save(str(tmp_path / "t.json"))
    other = make_shards(["a", "b", "a b a"], tokenizer=JsonTokenizer(tmp_path / "t.json"))
    with pytest.raises(ConfigError, match=r"data\.sources\[1\]\.shards: .* was made with another tokenizer than"):
        open_sources(config([three[0], other], [1, 1]))
    problems = DataConfig(sources=[SourceConfig("", 1), SourceConfig("x", 0)]).problems()
    assert [problem.split(":")[0] for problem in problems] == ["data.sources[0].shards", "data.sources[1].weight"]


@given(
    ranges=st.lists(st.tuples(st.integers(0, 300), st.integers(1, 60)), max_size=6),
    batch=st.integers(1, 40),
    begin=st.integers(0, 200),
)
def test_skip_list(ranges: list[tuple[int, int]], batch: int, begin: int) -> None:
    """Global batches continue after the ranges; nothing else is left out, and left-out ranges are reported."""
    skip = SkipList([[first, first + length] for first, length in ranges])
    skipped = {number for first, length in ranges for number in range(first, first + length)}
    expected = [number for number in range(begin, 2000) if number not in skipped]
    place, taken, passed = begin, [], []
    for _ in range(5):
        numbers = skip.take(place, batch).tolist()
        stop = numbers[-1] + 1
        passed += [number for first, last in skip.passed(place, stop) for number in range(first, last)]
        place = stop
        taken += numbers
    assert taken == expected[: 5 * batch]
    assert passed == [number for number in range(begin, place) if number in skipped]


def test_wrong_ranges_are_named() -> None:
    """Empty, backward and half ranges."""
    problems = DataConfig(skip=[[5, 5], [7, 3], [1], [0, 4]]).problems()
    assert len(problems) == 3 and all(problem.startswith("data.skip: ") for problem in problems)
