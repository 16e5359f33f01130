"""Denoising: nothing is lost, counts and lengths are exact, and masks are uniform."""

from collections import Counter
from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from colt5dist.data.order.objectives import Objective, sample_lengths, span_counts
from colt5dist.data.order.random_numbers import Draws, Stream, below, permutation, random_bits, subset
from colt5dist.data.read.denoise import denoise, random_part_ends

EOS, FIRST_SENTINEL, PAD = 1, 1000, 0


def run(
    tokens: np.ndarray, objective: Objective, seed: int, input_length: int, target_length: int
) -> tuple[list[int], list[int]]:
    """Inputs and targets of one sample; checks that nothing is written after their ends."""
    inputs, targets = np.full(input_length, PAD), np.full(target_length, PAD)
    num_inputs, num_targets = denoise(
        tokens,
        objective,
        random_bits(seed, 0, Stream.DENOISE),
        first_sentinel=FIRST_SENTINEL,
        eos_id=EOS,
        inputs=inputs,
        targets=targets,
    )
    assert (inputs[num_inputs:] == PAD).all() and (targets[num_targets:] == PAD).all()
    return inputs[:num_inputs].tolist(), targets[:num_targets].tolist()


def split_at_sentinels(ids: list[int]) -> tuple[list[int], list[list[int]]]:
    """The sentinels of a side, and the texts before, between and after them."""
    sentinels: list[int] = []
    texts: list[list[int]] = [[]]
    for token in ids:
        if token >= FIRST_SENTINEL:
            sentinels.append(token)
            texts.append([])
        else:
            texts[-1].append(token)
    return sentinels, texts


@settings(max_examples=150, deadline=None)
@given(
    input_length=st.integers(16, 3000),
    target_length=st.integers(4, 3000),
    rate=st.sampled_from([0.15, 0.5]),
    mean_span=st.sampled_from([1, 3, 8, 64]),
    shorter=st.floats(0, 1),
    seed=st.integers(0, 1 << 40),
)
def test_span_corruption(
    input_length: int, target_length: int, rate: float, mean_span: int, shorter: float, seed: int
) -> None:
    """Inputs and targets together are the text; the numbers of noise tokens and sentinels are those of the lengths."""
    objective = Objective("spans", rate, mean_span)
    lengths = sample_lengths(objective, input_length, target_length)
    full = shorter < 0.5
    raw_tokens = lengths.raw_tokens if full else max(2, int(shorter * lengths.raw_tokens))
    tokens = np.random.default_rng(seed).integers(2, FIRST_SENTINEL, raw_tokens).astype(np.uint16)
    inputs, targets = run(tokens, objective, seed, input_length, target_length)

    num_noise, num_spans = span_counts(raw_tokens, objective, target_length)
    assert len(inputs) == raw_tokens - num_noise + num_spans + 1
    assert len(targets) == num_noise + num_spans + 1
    if full:
        assert (len(inputs), len(targets)) == (lengths.input_tokens, lengths.target_tokens)
    assert inputs[-1] == targets[-1] == EOS
    kept_sentinels, kept = split_at_sentinels(inputs[:-1])
    noise_sentinels, noise = split_at_sentinels(targets[:-1])
    assert kept_sentinels == noise_sentinels == list(range(FIRST_SENTINEL, FIRST_SENTINEL + num_spans))
    # the text begins with a kept span and ends with a noise span, and no span is empty
    assert noise.pop(0) == [] and kept.pop() == []
    assert all(kept) and all(noise)
    assert [token for pair in zip(kept, noise, strict=True) for span in pair for token in span] == tokens.tolist()


@settings(max_examples=80, deadline=None)
@given(input_length=st.integers(16, 2000), target_length=st.integers(4, 3000), seed=st.integers(0, 1 << 40))
def test_prefix_lm(input_length: int, target_length: int, seed: int) -> None:
    """The targets are the end of the text; the inputs are the text before it, as much as fits."""
    objective = Objective("prefix", 0.5, None)
    lengths = sample_lengths(objective, input_length, target_length)
    tokens = np.random.default_rng(seed).integers(2, FIRST_SENTINEL, lengths.raw_tokens).astype(np.uint16)
    inputs, targets = run(tokens, objective, seed, input_length, target_length)
    assert inputs.pop() == targets.pop() == EOS
    suffix = len(targets)
    assert 1 <= suffix <= lengths.noise_tokens
    assert targets == tokens[-suffix:].tolist()
    assert inputs == tokens[:-suffix].tolist()[-(input_length - 1) :]
    assert inputs


@pytest.mark.parametrize(("rate", "mean_span", "raw_tokens"), [(0.3, 1, 10), (0.4, 2, 10), (0.25, 3, 12)])
def test_masks_are_uniform(rate: float, mean_span: int, raw_tokens: int) -> None:
    """Every mask with n noise tokens in s spans is equally frequent (chi-square, 5 standard deviations)."""
    objective = Objective("spans", rate, mean_span)
    num_noise, num_spans = span_counts(raw_tokens, objective, 100)
    num_masks = comb(num_noise - 1, num_spans - 1) * comb(raw_tokens - num_noise - 1, num_spans - 1)
    tokens = np.arange(2, 2 + raw_tokens)
    draws = 300 * num_masks
    counts = Counter(tuple(run(tokens, objective, seed, 100, 100)[1]) for seed in range(draws))
    assert len(counts) == num_masks
    chi_square = sum((count - 300) ** 2 / 300 for count in counts.values())
    freedom = num_masks - 1
    assert abs(chi_square - freedom) < 5 * (2 * freedom) ** 0.5 + 1


def test_suffixes_are_uniform() -> None:
    """Every suffix length of prefix-LM is equally frequent."""
    objective = Objective("prefix", 0.5, None)
    tokens = np.arange(2, 14)
    lengths = [len(run(tokens, objective, seed, 100, 9)[1]) - 1 for seed in range(4000)]
    counts = np.bincount(lengths, minlength=9)[1:]
    assert len(counts) == 8 and ((counts - 500) ** 2 / 500).sum() < 7 + 5 * 14**0.5


@settings(deadline=None)
@given(total=st.integers(1, 500), seed=st.integers(0, 1 << 60), data=st.data())
def test_random_part_ends(total: int, seed: int, data: st.DataObject) -> None:
    """The parts are positive and add up to the total."""
    ends = random_part_ends(random_bits(seed, 1, Stream.DENOISE), total, data.draw(st.integers(1, total)))
    assert ends[-1] == total and np.diff(ends, prepend=0).min() >= 1


@pytest.mark.parametrize(("size", "count"), [(6, 2), (6, 4), (5, 5), (5, 0)])
def test_subsets_are_uniform(size: int, count: int) -> None:
    """Every subset is equally frequent."""
    bits = random_bits(5, 0, Stream.DENOISE)
    counts = Counter(tuple(subset(bits, size, count).tolist()) for _ in range(300 * comb(size, count)))
    assert len(counts) == comb(size, count)
    freedom = len(counts) - 1
    assert sum((number - 300) ** 2 / 300 for number in counts.values()) <= freedom + 5 * (2 * freedom) ** 0.5


@settings(deadline=None)
@given(size=st.integers(0, 400), seed=st.integers(0, 1 << 60), data=st.data())
def test_subsets_of_draws_are_those_of_the_loop(size: int, seed: int, data: st.DataObject) -> None:
    """Both ways to draw give the same subset and use up the same numbers."""
    count = data.draw(st.integers(0, size))
    loop, draws = random_bits(seed, 1, Stream.DENOISE), Draws().restart(seed, 1, Stream.DENOISE)
    for _ in range(2):
        assert np.array_equal(subset(draws, size, count), subset(loop, size, count))
    assert draws.random_raw() == loop.random_raw()


def test_random_numbers_are_the_same_everywhere() -> None:
    """The numbers depend only on Philox; changing them would change the samples of every run."""
    assert random_bits(1, 2, Stream.DENOISE, 3).random_raw(2).tolist() == [13637179162896307606, 3186157565435691869]
    assert permutation(random_bits(1, 2, Stream.DEAL), 6).tolist() == [5, 1, 0, 4, 2, 3]
    assert subset(random_bits(1, 2, Stream.DENOISE), 10, 4).tolist() == [1, 4, 6, 8]
    draws = Draws()
    for seed, item in ((1, 2), (-1, 7), ((5 << 32) + 1, 1 << 40)):
        expected = random_bits(seed, item, Stream.DENOISE).random_raw(2000).tolist()
        draws.restart(seed, item, Stream.DENOISE)
        assert [int(draws.random_raw()), *(n for size in (3, 600, 0, 1396) for n in draws.random_raw(size))] == expected
    # seeds differ in every bit, also in the highest and lowest ones
    assert len({int(random_bits(seed, 0, Stream.DENOISE).random_raw()) for seed in (-1, -2, 1, 2, 1 << 63)}) == 5
    assert below(random_bits(-1, 2, Stream.DENOISE), 1000) == 917
