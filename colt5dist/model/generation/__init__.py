"""Writing text: greedily, by draws, or by beam search, from static caches, on a GPU with one CUDA graph a token."""

from colt5dist.model.generation.constraint import Constraint
from colt5dist.model.generation.decoder_state import DecoderState
from colt5dist.model.generation.inputs import EncodedInputs, check_inputs, encode_inputs, grouped, valid_spans
from colt5dist.model.generation.settings import GenerationSettings
from colt5dist.model.generation.write import (
    for_inference,
    sample_numbers,
    search_for,
    together,
    without_end,
    write,
    write_from_start,
)

__all__ = [
    "Constraint",
    "DecoderState",
    "EncodedInputs",
    "GenerationSettings",
    "check_inputs",
    "encode_inputs",
    "for_inference",
    "grouped",
    "sample_numbers",
    "search_for",
    "together",
    "valid_spans",
    "without_end",
    "write",
    "write_from_start",
]
