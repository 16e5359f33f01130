"""Makes inputs and targets from raw tokens: span corruption, prefix-LM and next-token, vectorized.

The spans follow T5's random segmentation: all masks with n noise tokens in s spans that begin with a kept token and end
with a noise token are equally likely. So the first token is never noise, and the last one always is.
"""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from colt5dist.data.order.objectives import MODES, Objective, largest_suffix, span_counts
from colt5dist.data.order.random_numbers import Bits, below, subset

Tokens = NDArray[np.integer]


def random_part_ends(bits: Bits, total: int, parts: int) -> NDArray[np.int64]:
    """Split `total` into `parts` positive numbers, uniformly at random.

    Args:
        bits: the random numbers.
        total: the sum.
        parts: how many numbers.

    Returns:
        (parts,) cumulative sums of the numbers; the last is `total`.
    """
    ends = np.empty(parts, dtype=np.int64)
    np.add(subset(bits, total - 1, parts - 1), 1, out=ends[:-1])
    ends[-1] = total
    return ends


def corrupt_spans(
    tokens: Tokens,
    kept_ends: NDArray[np.int64],
    noise_ends: NDArray[np.int64],
    *,
    first_sentinel: int,
    eos_id: int,
    inputs: Tokens,
    targets: Tokens,
) -> tuple[int, int]:
    """Write one span-corrupted text with L tokens, of which n are noise in s spans.

    To build a side quickly, its own tokens are copied together with one more token per span, whose place the sentinel
    then takes: the first token of the noise span for the inputs, the last token before the span for the targets.

    Args:
        tokens: (L,) the text.
        kept_ends: (s,) number of kept tokens before each noise span; the last entry is L - n.
        noise_ends: (s,) number of noise tokens up to the end of each noise span; the last entry is n.
        first_sentinel: id of sentinel 0; sentinel j replaces noise span j.
        eos_id: the end token, last of inputs and targets.
        inputs: (>= L - n + s + 1,) gets kept span 0, sentinel 0, kept span 1, ..., end token.
        targets: (>= n + s + 1,) gets sentinel 0, noise span 0, sentinel 1, ..., end token.

    Returns:
        The number of tokens written to inputs and to targets.
    """
    num_spans = len(noise_ends)
    noise_before = np.empty_like(noise_ends)
    noise_before[0] = 0
    noise_before[1:] = noise_ends[:-1]
    bounds = np.empty(2 * num_spans + 1, dtype=np.int64)  # of kept and noise spans, alternating
    bounds[0] = 0
    starts = np.add(kept_ends, noise_before, out=bounds[1::2])  # of the noise spans
    np.add(kept_ends, noise_ends, out=bounds[2::2])
    turns = np.zeros(2 * num_spans, dtype=np.bool_)
    turns[1::2] = True
    is_noise = turns.repeat(bounds[1:] - bounds[:-1])
    spans = np.arange(num_spans)
    sentinels = spans + first_sentinel

    shown = ~is_noise
    shown[starts] = True
    num_inputs = int(kept_ends[-1]) + num_spans
    inputs[:num_inputs] = tokens[shown]
    inputs[kept_ends + spans] = sentinels
    inputs[num_inputs] = eos_id

    shown = is_noise
    shown[starts - 1] = True
    num_targets = int(noise_ends[-1]) + num_spans
    targets[:num_targets] = tokens[shown]
    targets[noise_before + spans] = sentinels
    targets[num_targets] = eos_id
    return num_inputs + 1, num_targets + 1


def cut_prefix(tokens: Tokens, suffix: int, *, eos_id: int, inputs: Tokens, targets: Tokens) -> tuple[int, int]:
    """Write one prefix-LM text: its last tokens to `targets`, those before them to `inputs`.

    Args:
        tokens: (L,) the text.
        suffix: number of tokens for the targets.
        eos_id: the end token, last of inputs and targets.
        inputs: (input_length,) gets the prefix; a prefix that is too long loses its first tokens.
        targets: (target_length,) gets the suffix.

    Returns:
        The number of tokens written to inputs and to targets, end tokens included.
    """
    end = len(tokens) - suffix
    prefix = tokens[max(0, end + 1 - len(inputs)) : end]
    inputs[: len(prefix)] = prefix
    inputs[len(prefix)] = eos_id
    targets[:suffix] = tokens[end:]
    targets[suffix] = eos_id
    return len(prefix) + 1, suffix + 1


def split_pair(tokens: Tokens, eos_id: int) -> int:
    """Return the number of input tokens of a pair: those before its only end token."""
    place = int((tokens == eos_id).argmax())
    assert tokens[place] == eos_id, "no end token in a pair"
    return place


def write_pair(tokens: Tokens, *, eos_id: int, cut_inputs_at: str, inputs: Tokens, targets: Tokens) -> tuple[int, int]:
    """Write one pair; what is too long is cut, and the end tokens are kept.

    Args:
        tokens: (L,) the ids of the input, an end token, and the ids of the target.
        eos_id: the end token, last of inputs and targets.
        cut_inputs_at: the side on which an input loses tokens: "end" or "beginning". Targets lose them at the end.
        inputs: (input_length,) gets the input.
        targets: (target_length,) gets the target.

    Returns:
        The number of tokens written to inputs and to targets, end tokens included.
    """
    end = split_pair(tokens, eos_id)
    cut = max(0, end + 1 - len(inputs))
    kept = tokens[cut:end] if cut_inputs_at == "beginning" else tokens[: end - cut]
    target = tokens[end + 1 :][: len(targets) - 1]
    inputs[: len(kept)] = kept
    inputs[len(kept)] = eos_id
    targets[: len(target)] = target
    targets[len(target)] = eos_id
    return len(kept) + 1, len(target) + 1


def denoise(
    tokens: Tokens,
    objective: Objective,
    bits: Bits,
    *,
    first_sentinel: int,
    eos_id: int,
    inputs: Tokens,
    targets: Tokens,
) -> tuple[int, int]:
    """Write one sample of `objective`.

    Args:
        tokens: (L,) the text, L at least 2 (next-token: 1) and at most the objective's
            sample_lengths(objective, len(inputs), len(targets)).raw_tokens.
        objective: the objective.
        bits: the random numbers of the sample.
        first_sentinel: id of sentinel 0.
        eos_id: the end token, last of inputs and targets.
        inputs: (input_length,) its first tokens are written (next-token: one at most).
        targets: (target_length,) its first tokens are written.

    Returns:
        The number of tokens written to inputs and to targets.
    """
    if objective.is_next_token:
        inputs[:1] = eos_id
        targets[: len(tokens)] = tokens
        return len(inputs[:1]), len(tokens)
    if objective.mode is not None:
        # the ids of the modes come just before those of the sentinels
        inputs[0] = first_sentinel - len(MODES) + MODES.index(objective.mode)
        rest = replace(objective, mode=None)
        num_inputs, num_targets = denoise(
            tokens, rest, bits, first_sentinel=first_sentinel, eos_id=eos_id, inputs=inputs[1:], targets=targets
        )
        return num_inputs + 1, num_targets
    if objective.mean_span is None:
        suffix = 1 + below(bits, largest_suffix(len(tokens), objective, len(targets)))
        return cut_prefix(tokens, suffix, eos_id=eos_id, inputs=inputs, targets=targets)
    num_noise, num_spans = span_counts(len(tokens), objective, len(targets))
    return corrupt_spans(
        tokens,
        random_part_ends(bits, len(tokens) - num_noise, num_spans),
        random_part_ends(bits, num_noise, num_spans),
        first_sentinel=first_sentinel,
        eos_id=eos_id,
        inputs=inputs,
        targets=targets,
    )
