"""A micro-batch of samples, in the form that the model and the trainer take."""

from collections.abc import Sequence
from typing import TypedDict

import numpy as np
import torch
from torch import Tensor

from colt5dist.data.read.samples import Samples

FILLER = -1
"""Sample number of a row that holds no sample."""


class Batch(TypedDict):
    """A micro-batch of b samples, with inputs padded to n tokens and targets padded to t tokens."""

    input_ids: Tensor
    """(b, n) int64; the last valid token is the end token, then follow pads."""
    input_mask: Tensor
    """(b, n) bool; True at valid tokens."""
    decoder_input_ids: Tensor
    """(b, t) int64; the targets shifted right by one, beginning with the pad id."""
    target_ids: Tensor
    """(b, t) int64; the last valid token is the end token (except in causal samples, which have none), then pads."""
    target_mask: Tensor
    """(b, t) bool; True at valid tokens."""
    objective: Tensor
    """(b,) int64; index into the names of the mixture's objectives."""
    sample_index: Tensor
    """(b,) int64; number of the sample in the run, -1 for a row that only fills the batch (its masks are False)."""
    target_bytes: Tensor
    """(b,) int64; bytes of text that the valid targets represent."""


def make_batch(samples: Samples, numbers: Sequence[int]) -> Batch:
    """Make one batch.

    Args:
        samples: makes the samples.
        numbers: sample numbers, one per row; FILLER gives an empty row.

    Raises:
        DamagedShardError: more text is damaged than data.max_bad_records allows, or it cannot be read.
    """
    num_rows = len(numbers)
    inputs = np.full((num_rows, samples.config.input_length), samples.pad_id, dtype=np.int64)
    targets = np.full((num_rows, samples.config.target_length), samples.pad_id, dtype=np.int64)
    input_lengths = np.zeros(num_rows, dtype=np.int64)
    target_lengths = np.zeros(num_rows, dtype=np.int64)
    objectives = np.zeros(num_rows, dtype=np.int64)
    for row, number in enumerate(numbers):
        if number != FILLER:
            input_lengths[row], target_lengths[row], objectives[row] = samples.write(number, inputs[row], targets[row])
    target_mask = np.arange(targets.shape[1]) < target_lengths[:, None]
    decoder_inputs = np.full_like(targets, samples.pad_id)
    np.copyto(decoder_inputs[:, 1:], targets[:, :-1], where=target_mask[:, 1:])
    return Batch(
        input_ids=torch.from_numpy(inputs),
        input_mask=torch.from_numpy(np.arange(inputs.shape[1]) < input_lengths[:, None]),
        decoder_input_ids=torch.from_numpy(decoder_inputs),
        target_ids=torch.from_numpy(targets),
        target_mask=torch.from_numpy(target_mask),
        objective=torch.from_numpy(objectives),
        sample_index=torch.tensor(numbers, dtype=torch.int64),
        target_bytes=torch.from_numpy(samples.text_bytes(targets)),
    )
