"""Mixtures: what a configuration may name, UL2's seven with their mode tokens, and shares of the samples by weight."""

from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from colt5dist.data.compatibility import data_problems
from colt5dist.data.config import DataConfig
from colt5dist.data.order.mixture import MIXTURES, parse_mixture
from colt5dist.data.order.objectives import MODES, sample_lengths
from colt5dist.data.order.random_numbers import Stream, random_bits
from colt5dist.data.read.batch import make_batch
from colt5dist.data.read.denoise import denoise
from colt5dist.data.read.samples import Samples
from colt5dist.data.read.shards import ShardSet
from colt5dist.data.sample_lengths import required_sentinels

VOCABULARY, EOS, PAD = 300, 1, 0


def test_names() -> None:
    """The names of CoLT5's four objectives appear in metrics.jsonl; other names say what differs from the usual."""
    assert parse_mixture("colt5").names == ("prefix_lm", "span_3", "span_8", "span_64")
    mixture = parse_mixture(["span_corruption(3, 0.15)", "span_corruption(64,0.5)", "prefix_lm(0.25)", "causal"])
    assert mixture.names == ("span_3", "span_64_rate_0.5", "prefix_lm_rate_0.25", "next_token")
    assert parse_mixture(["colt5"]) == parse_mixture("colt5")
    assert len(set(parse_mixture(["colt5", "ul2"]).names)) == 11


def test_an_entry_named_twice_counts_twice() -> None:
    mixture = parse_mixture(["prefix_lm", "colt5", "prefix_lm(0.5)"])
    assert mixture.names == ("prefix_lm", "span_3", "span_8", "span_64") and mixture.weights == (3, 1, 1, 1)


@pytest.mark.parametrize(
    ("mixture", "message"),
    [
        ([], "data.mixture: is empty; give some of colt5, ul2, causal, prefix_lm"),
        ("ul3", "data.mixture: 'ul3' is unknown; choose some of colt5"),
        (["span_corruption(3", "0.15)"], "an entry with a comma needs quotes"),
        (["span_corruption(3)"], "has the wrong number of settings"),
        (["span_corruption(a, b)"], "needs numbers in the brackets"),
        (["span_corruption(0.5, 0.15)"], "give a mean of 1 or more"),
        (["span_corruption(3, 1)"], "a rate above 0 and at most 0.9"),
        (["prefix_lm(0.7)"], "the rate (mean share of the suffix) must be above 0 and at most 0.5"),
        (5, "data.mixture: 5 is neither a name nor a list of names"),
    ],
)
def test_what_names_no_mixture(mixture: object, message: str) -> None:
    """Each problem is a line that names the key."""
    problems = DataConfig(mixture=mixture).problems()
    assert problems and any(message in problem for problem in problems)
    assert all(problem.startswith("data.mixture: ") and "\n" not in problem for problem in problems)


def test_causal_has_no_input() -> None:
    """Alone it needs input_length 0; in a mixture its input is the end token."""
    assert DataConfig(mixture="causal", input_length=0).problems() == []
    (problem,) = DataConfig(mixture=["causal"], input_length=512).problems()
    assert problem.startswith("data.input_length: 512 is not used with data.mixture=causal; set 0")
    (problem,) = DataConfig(mixture=["causal", "prefix_lm"], input_length=0).problems()
    assert problem.startswith("data.input_length: 0 is too small")


@settings(max_examples=200, deadline=None)
@given(
    place=st.integers(0, 6),
    input_length=st.integers(20, 3000),
    target_length=st.integers(8, 3000),
    vocabulary=st.integers(8, 60_000),
    seed=st.integers(0, 1 << 40),
)
def test_ul2(place: int, input_length: int, target_length: int, vocabulary: int, seed: int) -> None:
    """The input begins with the objective's mode token and has the exact length; the rest gives the text."""
    objective = MIXTURES["ul2"][place]
    lengths = sample_lengths(objective, input_length, target_length)
    tokens = np.random.default_rng(seed).integers(2, vocabulary, lengths.raw_tokens).astype(np.uint16)
    inputs, targets = np.full(input_length, PAD), np.full(target_length, PAD)
    first_sentinel = vocabulary + len(MODES)
    num_inputs, num_targets = denoise(
        tokens,
        objective,
        random_bits(seed, 3, Stream.DENOISE),
        first_sentinel=first_sentinel,
        eos_id=EOS,
        inputs=inputs,
        targets=targets,
    )
    assert inputs[0] == vocabulary + MODES.index(str(objective.mode))
    assert inputs[num_inputs - 1] == targets[num_targets - 1] == EOS
    body, written = inputs[1 : num_inputs - 1], targets[: num_targets - 1]
    if objective.mean_span is None:
        assert np.array_equal(np.concatenate([body, written])[-len(tokens) :], tokens[-len(body) - len(written) :])
        return
    assert (num_inputs, num_targets) == (lengths.input_tokens, lengths.target_tokens)
    sentinels = body[body >= first_sentinel]
    assert sentinels.tolist() == list(range(first_sentinel, first_sentinel + lengths.num_spans))
    assert np.array_equal(written[written >= first_sentinel], sentinels)
    spans = np.split(written, np.flatnonzero(written >= first_sentinel))[1:]
    kept = np.split(body, np.flatnonzero(body >= first_sentinel))
    pieces = [kept[0]]
    for span, text in zip(spans, kept[1:], strict=True):
        pieces += [span[1:], text[1:]]
    assert np.array_equal(np.concatenate(pieces), tokens)


def test_ul2_needs_ids_for_its_modes(make_shards: Callable[..., ShardSet], shards: ShardSet) -> None:
    """Three ids between the tokenizer's and the sentinels'."""
    config = DataConfig(input_length=512, target_length=300, mixture="ul2")
    needed = shards.tokenizer.vocab_size + 3 + required_sentinels(config)
    assert data_problems(config, shards, needed) == []
    (problem,) = data_problems(config, shards, needed - 1)
    assert ", 3 mode tokens and " in problem
    batch = make_batch(Samples(shards, config, seed=0), range(200))
    assert set(batch["objective"].tolist()) == set(range(7))
    assert int(batch["input_ids"].max()) < needed
    modes = batch["input_ids"][:, 0] - shards.tokenizer.vocab_size
    expected = [MODES.index(str(MIXTURES["ul2"][number].mode)) for number in batch["objective"].tolist()]
    assert modes.tolist() == expected


def test_next_token_beside_others(shards: ShardSet) -> None:
    """Its target is the unchanged text, its input the end token."""
    config = DataConfig(input_length=64, target_length=48, mixture=["causal", "prefix_lm"])
    samples = Samples(shards, config, seed=0)
    batch = make_batch(samples, range(60))
    rows = [row for row in range(60) if batch["objective"][row] == 0]
    assert len(rows) > 15
    for row in rows:
        assert batch["input_ids"][row, 0] == 1 and int(batch["input_mask"][row].sum()) == 1
        text = samples._readers[0].read_chunk(samples.planned(row).chunk)
        assert batch["target_ids"][row][batch["target_mask"][row]].tolist() == text.tolist()
    alone = make_batch(Samples(shards, DataConfig(input_length=0, target_length=48, mixture="causal"), seed=0), [0, 1])
    assert alone["input_ids"].shape == (2, 0) and alone["target_mask"].all()


@pytest.mark.parametrize(
    "entries", [["colt5"], ["ul2"], ["prefix_lm", "prefix_lm", "prefix_lm", "span_corruption(8, 0.15)"]]
)
def test_shares(make_shards: Callable[..., ShardSet], shards: ShardSet, entries: list[str]) -> None:
    """The samples of an epoch are divided by weight (the chi-square is far below that of random draws)."""
    config = DataConfig(input_length=64, target_length=40, mixture=entries)
    samples = Samples(shards, config, seed=1)
    mixture = parse_mixture(entries)
    number = 4000
    counts = Counter(samples.planned(index).objective for index in range(number))
    expected = np.array(mixture.weights) / sum(mixture.weights) * number
    found = np.array([counts[place] for place in range(len(expected))])
    assert ((found - expected) ** 2 / expected).sum() < len(expected) + 3 * (2 * len(expected)) ** 0.5
