"""The denoising objectives, and how long their samples are.

A sample starts as `raw_tokens` consecutive tokens of text. Span corruption (Raffel et al. 2020, arXiv 1910.10683)
replaces spans of them by sentinels and lets the decoder write sentinel and span in turn; prefix-LM cuts the text in
two. The lengths follow from the objective, so that an input is filled exactly and a target is never cut:

- span corruption of L raw tokens: n = round(L * rate) noise tokens in s = round(n / mean span) spans give L - n + s +
  1 input and n + s + 1 target tokens (the last of each is the end token). L is the largest with no more than
  input_length inputs. Where the targets would be longer than target_length, n is lowered until they fit, and L
  follows.
- prefix-LM: the suffix is drawn uniform in 1..min(target_length - 1, 2 * rate * L - 1), and L is input_length - 1
  plus the mean suffix. A prefix longer than input_length - 1 loses its first tokens; a shorter one is padded.
  (Filling both sides exactly would fix the suffix, which is not the paper's objective.)
- next-token: target_length tokens of text as they stand are the target, without an end token of its own, as the text
  goes on. A decoder-only model has no input; where other objectives have one, this one's is the end token alone.

A mode token is the first token of the input, which has one place less for the rest.
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
    """Share of the raw tokens that the decoder writes (prefix-LM: in the mean, where target_length allows it)."""
    mean_span: float | None
    """Mean tokens of a noise span; None: one span, at the end, without a sentinel (prefix-LM), or all (next-token)."""
    mode: str | None = None
    """The mode token that the input begins with, one of MODES."""

    @property
    def is_next_token(self) -> bool:
        """Whether the decoder writes all of the text: there is no input."""
        return self.noise_rate == 1


MODES = ("R", "S", "X")
"""UL2's mode tokens (Tay et al. 2022, arXiv 2205.05131): ordinary spans, sequential, extreme."""


@dataclass(frozen=True)
class SampleLengths:
    """Lengths in tokens of a full sample of one objective."""

    raw_tokens: int
    """Tokens of text that the sample is made from."""
    noise_tokens: int
    """Tokens that the decoder writes, without sentinels and end token (prefix-LM: the most)."""
    num_spans: int
    """Noise spans, which is the number of sentinels (prefix-LM and next-token: 0)."""
    input_tokens: int
    """Tokens of the encoder input, end token included (prefix-LM: the most)."""
    target_tokens: int
    """Tokens of the decoder target, end token included (prefix-LM: the most)."""


@lru_cache(maxsize=1024)
def span_counts(raw_tokens: int, objective: Objective, target_length: int) -> tuple[int, int]:
    """Noise tokens and spans of `raw_tokens` (at least 2) raw tokens under a span-corruption objective."""
    assert objective.mean_span is not None and raw_tokens >= 2, (objective, raw_tokens)
    mean_span = objective.mean_span

    def num_spans(noise_tokens: int) -> int:
        return max(1, min(round(noise_tokens / mean_span), noise_tokens, raw_tokens - noise_tokens))

    noise_tokens = min(max(round(raw_tokens * objective.noise_rate), 1), raw_tokens - 1)
    if noise_tokens + num_spans(noise_tokens) + 1 > target_length:
        noise_tokens = _largest(lambda n: n + num_spans(n) + 1 <= target_length, 1, noise_tokens)
    return noise_tokens, num_spans(noise_tokens)


def largest_suffix(raw_tokens: int, objective: Objective, target_length: int) -> int:
    """The longest suffix that prefix-LM may draw from `raw_tokens` (at least 2) raw tokens."""
    assert raw_tokens >= 2, raw_tokens
    return max(1, min(target_length - 1, int(2 * objective.noise_rate * raw_tokens) - 1, raw_tokens - 1))


def sample_lengths(objective: Objective, input_length: int, target_length: int) -> SampleLengths:
    """Lengths of a full sample: as many raw tokens as an input of `input_length` tokens can be made from."""
    if objective.is_next_token:
        return SampleLengths(target_length, target_length, 0, min(1, input_length), target_length)
    if objective.mode is not None:
        rest = sample_lengths(replace(objective, mode=None), input_length - 1, target_length)
        return replace(rest, input_tokens=rest.input_tokens + 1)
    if objective.mean_span is None:
        # a text of `raw` tokens fills the input when the suffix has its mean length
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
    """The largest number in low..high for which `fits` holds; it holds at `low` and, once false, stays false."""
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle):
            low = middle
        else:
            high = middle - 1
    return low
