"""Lengths of samples: the published table, exactness, and reduced noise for short targets."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from colt5dist.data.config import DataConfig
from colt5dist.data.order.mixture import MIXTURES, lengths_of_mixture, parse_mixture
from colt5dist.data.order.objectives import Objective, sample_lengths
from colt5dist.data.sample_lengths import length_notes, required_sentinels

UNLIMITED = 1 << 30


@pytest.mark.parametrize(
    ("input_length", "mean_span", "raw", "targets", "sentinels"),
    [
        (512, 3, 568, 114, 28),
        (512, 8, 588, 100, 11),
        (512, 64, 600, 92, 1),
        (4096, 3, 4550, 910, 227),
        (4096, 8, 4714, 796, 88),
        (4096, 64, 4805, 733, 11),
        (16384, 3, 18204, 3642, 910),
        (16384, 8, 18858, 3184, 354),
        (16384, 64, 19221, 2929, 45),
        (65536, 3, 72817, 14565, 3641),
        (65536, 8, 75437, 12731, 1414),
        (65536, 64, 76888, 11714, 180),
    ],
)
def test_lengths_of_t5(input_length: int, mean_span: int, raw: int, targets: int, sentinels: int) -> None:
    """At rate 0.15 the lengths are those of T5's own helper."""
    lengths = sample_lengths(Objective("spans", 0.15, mean_span), input_length, UNLIMITED)
    assert (lengths.raw_tokens, lengths.target_tokens, lengths.num_spans) == (raw, targets, sentinels)
    assert lengths.input_tokens == input_length


def test_colt5_at_4096() -> None:
    """CoLT5's 910 targets hold all of its span corruption, and cap the suffix of prefix-LM."""
    assert parse_mixture("colt5").names == ("prefix_lm", "span_3", "span_8", "span_64")
    prefix, *spans = lengths_of_mixture("colt5", 4096, 910)
    assert (prefix.raw_tokens, prefix.target_tokens) == (4095 + 455, 910)
    assert [length.target_tokens for length in spans] == [910, 796, 733]
    assert required_sentinels(DataConfig(input_length=4096, target_length=910)) == 227


@given(
    input_length=st.integers(16, 70000),
    target_length=st.integers(4, 20000),
    rate=st.sampled_from([0.15, 0.25, 0.5]),
    mean_span=st.sampled_from([1, 3, 8, 64]),
)
def test_spans_fill_the_input_and_fit_the_target(
    input_length: int, target_length: int, rate: float, mean_span: int
) -> None:
    """No target is truncated, no input is too long, and one more raw token would not fit."""
    objective = Objective("spans", rate, mean_span)
    lengths = sample_lengths(objective, input_length, target_length)
    assert lengths.input_tokens == lengths.raw_tokens - lengths.noise_tokens + lengths.num_spans + 1 <= input_length
    assert lengths.target_tokens == lengths.noise_tokens + lengths.num_spans + 1 <= target_length
    assert 1 <= lengths.num_spans <= min(lengths.noise_tokens, lengths.raw_tokens - lengths.noise_tokens)
    # one more raw token adds a kept token, or a noise token and at most one sentinel
    assert lengths.input_tokens >= input_length - 1


@given(input_length=st.integers(16, 70000), target_length=st.integers(4, 200000))
def test_prefix_has_the_input_length_in_the_mean(input_length: int, target_length: int) -> None:
    """The raw length leaves a full input when the suffix has its mean length."""
    lengths = sample_lengths(MIXTURES["colt5"][0], input_length, target_length)
    mean_suffix = (1 + lengths.noise_tokens) / 2
    assert abs(lengths.raw_tokens - mean_suffix - (input_length - 1)) <= 1
    assert lengths.noise_tokens == min(target_length - 1, lengths.raw_tokens - 1)


def test_notes_name_the_objectives_that_are_lowered() -> None:
    """A short target_length is reported at start, with the share of noise that remains."""
    assert not length_notes(DataConfig(input_length=4096, target_length=8190))
    notes = length_notes(DataConfig(input_length=16384, target_length=910))
    assert len(notes) == 4
    assert notes[1] == (
        "span_3: targets of at most 910 tokens hold on average 4.1% of its text, not 15%; a larger data.target_length "
        "holds more"
    )
    # at the paper's own lengths only the prefix is longer than its rate says, and that is no mistake of the user
    (note,) = length_notes(DataConfig(input_length=4096, target_length=910))
    assert note.startswith("prefix_lm: targets of at most 910 tokens hold on average 10.0% of its text, not 50%; ")
    assert note.endswith("these are the CoLT5 paper's own lengths, and nothing needs to be changed")
    (note,) = length_notes(DataConfig(input_length=512, target_length=114))
    assert note.endswith(
        "; 512/114 is the proportion of the CoLT5 paper's lengths (4096/910), and nothing needs to be changed"
    )
