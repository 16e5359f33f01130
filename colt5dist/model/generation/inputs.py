"""Inputs of any length through the encoder, each as if it were alone in its batch.

How many tokens the encoder routes follows from the length of what it is given, padding included. So inputs are grouped
by their own length, rounded up to the model's multiple, and no input is padded further than that: what comes out for an
input does not depend on the inputs beside it, but for rounding.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from colt5dist.model.config import CoLT5Config
from colt5dist.nn.checks import check_device, check_mask, check_tensor


class EncodedInputs(NamedTuple):
    """What the decoder sees of the inputs."""

    states: Tensor
    """(b, n, d_model), the states of the valid tokens first."""
    lengths: Tensor
    """(b,) int64, valid tokens of each input."""


class HasEncoder(Protocol):
    """What is needed of a model."""

    config: CoLT5Config

    def encode(
        self, input_ids: Tensor, *, input_mask: Tensor | None, sample_index: Tensor | None
    ) -> tuple[Tensor, Any]:
        """States (b, n, d_model) of input_ids (b, n)."""
        ...


class Span(NamedTuple):
    """Where the valid tokens of a row are."""

    first: int
    """The first valid token."""
    end: int
    """The one after the last."""
    has_gaps: bool
    """Whether there is padding between them."""


def check_inputs(name: str, ids: Any, mask: Any, mask_name: str, device: torch.device) -> None:
    """Raise where ids and mask cannot be what a model on `device` reads.

    Raises:
        TypeError: an argument is no tensor.
        ValueError: a type, shape or device is wrong.
    """
    check_tensor(name, ids)
    if ids.dim() != 2 or ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{name}: {tuple(ids.shape)} of {ids.dtype}; use int64 (batch, tokens)")
    if ids.device != device:
        raise ValueError(f"{name}: on {ids.device}, but the model is on {device}; use one device")
    if not ids.shape[0]:
        raise ValueError(f"{name}: no sample; use a batch of 1 or more")
    if mask is not None:
        check_tensor(mask_name, mask)
        check_device(mask_name, mask, ids, name)
    check_mask(mask_name, mask, ids.shape, ids, name)


def valid_spans(name: str, ids: Tensor, mask: Tensor | None, vocab_size: int) -> list[Span]:
    """Where the valid tokens of each row are: the one look of the host at the inputs.

    Raises:
        ValueError: a row has no valid token, or one whose id is not in the vocabulary.
    """
    n = ids.shape[1]
    if not n:
        raise ValueError(f"{name}: no token; use one or more for each sample")
    if mask is None:
        mask = torch.ones_like(ids, dtype=torch.bool)
    place = torch.arange(n, device=ids.device)
    wrong = ((ids < 0) | (ids >= vocab_size)) & mask
    columns = (
        torch.where(mask, place, n).amin(dim=1),
        torch.where(mask, place + 1, 0).amax(dim=1),
        mask.sum(dim=1),
        ids.gather(1, wrong.to(torch.int8).argmax(dim=1, keepdim=True)).squeeze(1),
        wrong.any(dim=1),
    )
    spans = []
    for row, (first, end, number, first_wrong, is_wrong) in enumerate(torch.stack(columns, dim=1).tolist()):
        if not number:
            raise ValueError(f"{name}: sample {row} has no valid token; use one or more for each sample")
        if is_wrong:
            raise ValueError(f"{name}: sample {row} has the id {first_wrong}; use 0 to {vocab_size - 1}")
        spans.append(Span(first, end, end - first > number))
    return spans


def grouped(keys: Sequence[Any]) -> list[list[int]]:
    """Numbers of the rows with equal keys, in the order of their first rows."""
    groups: dict[Any, list[int]] = {}
    for row, key in enumerate(keys):
        groups.setdefault(key, []).append(row)
    return list(groups.values())


def encode_inputs(
    model: HasEncoder, input_ids: Tensor, input_mask: Tensor | None, sample_index: Tensor | None
) -> EncodedInputs:
    """Encode inputs of any length.

    Args:
        model: whose `encode` reads multiples of `config.input_multiple` tokens.
        input_ids: (b, n) int64, any n of 1 or more.
        input_mask: (b, n) bool, True = valid; None: all.
        sample_index: (b,) int64, the samples' numbers, for random routing.

    Returns:
        `EncodedInputs`, as long as the longest input.

    Raises:
        ValueError: an input has no valid token, or one outside of the vocabulary.
    """
    spans = valid_spans("input_ids", input_ids, input_mask, model.config.vocab_size)
    multiple = model.config.input_multiple
    lengths = [-(-(span.end - span.first) // multiple) * multiple for span in spans]
    parts = []
    for rows in grouped(lengths):
        ids = input_ids.new_zeros(len(rows), lengths[rows[0]])
        mask = torch.zeros_like(ids, dtype=torch.bool)
        for place, row in enumerate(rows):
            first, end, _ = spans[row]
            ids[place, : end - first] = input_ids[row, first:end]
            mask[place, : end - first] = True if input_mask is None else input_mask[row, first:end]
        is_full = all(spans[r].end - spans[r].first == ids.shape[1] and not spans[r].has_gaps for r in rows)
        index = None if sample_index is None else sample_index[rows]
        states, _ = model.encode(ids, input_mask=None if is_full else mask, sample_index=index)
        if any(spans[row].has_gaps for row in rows):
            # cross-attention knows no positions: the valid tokens can stand together
            order = (~mask).to(torch.int8).argsort(dim=1, stable=True)
            states = states.gather(1, order.unsqueeze(-1).expand_as(states))
        parts.append((rows, states, mask.sum(dim=1)))
    if len(parts) == 1:
        return EncodedInputs(*parts[0][1:])
    together = parts[0][1].new_zeros(len(spans), max(lengths), parts[0][1].shape[-1])
    counts = torch.zeros(len(spans), dtype=torch.int64, device=input_ids.device)
    for rows, states, count in parts:
        together[rows, : states.shape[1]] = states
        counts[rows] = count
    return EncodedInputs(together, counts)
