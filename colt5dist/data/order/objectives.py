"""The settings of the denoising objectives, and the lengths of their samples; read/denoise.py makes the samples.

A sample is made from `raw_tokens` consecutive tokens of text. Span corruption (Raffel et al. 2020, arXiv 1910.10683)
replaces spans of them by sentinels, and the target is each sentinel followed by its span; prefix-LM cuts the text in
two. The lengths follow from the objective, so that an input is filled exactly and a target is never truncated:

- span corruption of L raw tokens: n = round(L * rate) noise tokens in s = round(n / mean span) spans give L - n + s +
  1 input and n + s + 1 target tokens (the last of each is the end token). L is the largest number with at most
  input_length input tokens. Where the target would be longer than target_length, n is reduced until it fits, and L
  changes with it.
- prefix-LM: the length of the suffix is drawn uniformly from 1..min(target_length - 1, 2 * rate * L - 1), and L is
  input_length - 1 plus the mean suffix. A prefix longer than input_length - 1 loses its first tokens; a shorter one is
  padded. (Filling both sides exactly would fix the length of the suffix, which is not the paper's objective.)
- next-token: target_length tokens of text are the target, unchanged and without an end token, since the text continues
  after them. A decoder-only model has no input; in a mixture with other objectives, the input is only the end token.

- pairs: the text is an input, an end token, and a target. Input and target get an end token each; what is too long
  is cut.

A mode token is the first token of the input and leaves one token less for the rest.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache


@dataclass(frozen=True)
class Objective:
    """One denoising objective of a mixture."""

    name: str
    """Name in logs and metrics."""
    noise_rate: float
    """Share of the raw tokens that are noise, in the target (prefix-LM: the mean, where target_length allows it)."""
    mean_span: float | None
    """Mean tokens per noise span; None: one span at the end without a sentinel (prefix-LM), all (next-token), or none
    (pairs)."""
    mode: str | None = None
    """The mode token that the input begins with, one of MODES."""

    @property
    def is_next_token(self) -> bool:
        """Whether the whole text is the target, without an input."""
        return self.noise_rate == 1

    @property
    def is_pair(self) -> bool:
        """Whether the text is an input and its target, and nothing is corrupted."""
        return self.noise_rate == 0


MODES = ("R", "S", "X")
"""UL2's mode tokens (Tay et al. 2022, arXiv 2205.05131): ordinary spans, sequential, extreme."""


@dataclass(frozen=True)
class SampleLengths:
    """Lengths in tokens of a full sample of one objective."""

    raw_tokens: int
    """Tokens of text that the sample is made from (pairs: the most that are used)."""
    noise_tokens: int
    """Raw tokens in the target, without sentinels and end token (prefix-LM and pairs: the maximum)."""
    num_spans: int
    """Number of noise spans, which is the number of sentinels (prefix-LM, next-token and pairs: 0)."""
    input_tokens: int
    """Tokens of the encoder input, end token included (prefix-LM and pairs: the maximum)."""
    target_tokens: int
    """Tokens of the decoder target, end token included (prefix-LM and pairs: the maximum)."""


@lru_cache(maxsize=1024)
def span_counts(raw_tokens: int, objective: Objective, target_length: int) -> tuple[int, int]:
    """Return the numbers of noise tokens and of noise spans of a text under a span-corruption objective.

    Args:
        raw_tokens: tokens of the text, at least 2.
        objective: the objective.
        target_length: most tokens of a target.
    """
    assert objective.mean_span is not None and raw_tokens >= 2, (objective, raw_tokens)
    mean_span = objective.mean_span

    def num_spans(noise_tokens: int) -> int:
        return max(1, min(round(noise_tokens / mean_span), noise_tokens, raw_tokens - noise_tokens))

    noise_tokens = min(max(round(raw_tokens * objective.noise_rate), 1), raw_tokens - 1)
    if noise_tokens + num_spans(noise_tokens) + 1 > target_length:
        noise_tokens = _largest(lambda n: n + num_spans(n) + 1 <= target_length, 1, noise_tokens)
    return noise_tokens, num_spans(noise_tokens)


def largest_suffix(raw_tokens: int, objective: Objective, target_length: int) -> int:
    """Return the length of the longest suffix that prefix-LM may draw from a text.

    Args:
        raw_tokens: tokens of the text, at least 2.
        objective: the objective.
        target_length: most tokens of a target.
    """
    assert raw_tokens >= 2, raw_tokens
    return max(1, min(target_length - 1, int(2 * objective.noise_rate * raw_tokens) - 1, raw_tokens - 1))


def sample_lengths(objective: Objective, input_length: int, target_length: int) -> SampleLengths:
    """Return the lengths of a full sample, which has the most raw tokens that fit.

    Args:
        objective: the objective.
        input_length: most tokens of an input, end token included.
        target_length: most tokens of a target, end token included.
    """
    if objective.is_next_token:
        return SampleLengths(target_length, target_length, 0, min(1, input_length), target_length)
    if objective.is_pair:
        return SampleLengths(input_length + target_length - 1, target_length - 1, 0, input_length, target_length)
    if objective.mode is not None:
        rest = sample_lengths(replace(objective, mode=None), input_length - 1, target_length)
        return replace(rest, input_tokens=rest.input_tokens + 1)
    if objective.mean_span is None:
        # a text of `raw_tokens` tokens fills the input when the suffix has its mean length
        def fits_prefix(raw_tokens: int) -> bool:
            return raw_tokens <= input_length - 1 + (1 + largest_suffix(raw_tokens, objective, target_length)) // 2

        raw_tokens = _largest(fits_prefix, 2, input_length + target_length)
        suffix = largest_suffix(raw_tokens, objective, target_length)
        return SampleLengths(raw_tokens, suffix, 0, input_length, suffix + 1)

    def num_inputs(raw_tokens: int) -> int:
        noise_tokens, num_spans = span_counts(raw_tokens, objective, target_length)
        return raw_tokens - noise_tokens + num_spans + 1

    raw_tokens = _largest(
        lambda raw: num_inputs(raw) <= input_length, 2, int(input_length / (1 - objective.noise_rate)) + 2
    )
    noise_tokens, num_spans = span_counts(raw_tokens, objective, target_length)
    return SampleLengths(raw_tokens, noise_tokens, num_spans, num_inputs(raw_tokens), noise_tokens + num_spans + 1)


def _largest(fits: Callable[[int], bool], low: int, high: int) -> int:
    """The largest number in low..high for which `fits` is true; it is true at `low` and, once false, stays false."""
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle):
            low = middle
        else:
            high = middle - 1
    return low
