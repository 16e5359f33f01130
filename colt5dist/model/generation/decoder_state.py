"""The T5 decoder token by token: static caches, and keys and values of the inputs that are computed once."""

import torch
from torch import Tensor

from colt5dist.model.decoder import Decoder, DecoderLayer
from colt5dist.model.generation.inputs import EncodedInputs
from colt5dist.model.vocabulary_loss import VocabularyLoss
from colt5dist.nn.attention.decoding import cross_attention_step, feed_forward_step, self_attention_step
from colt5dist.nn.embedding import Embedding


class DecoderState:
    """What decoding keeps, in tensors that stay where they are, so that a step can be a CUDA graph.

    For each layer: keys and values of the decoded tokens, (rows, slots, heads, dim_head) each, and of the inputs,
    (b, n, 2 * dim_head), for cross-attention has one head of them. The rows of a sample are neighbours.

    Args:
        embedding: of the decoder's inputs.
        decoder: the decoder.
        output: the output embedding.
        inputs: what the encoder has read.
        rows_per_sample: sequences that are written for each sample.
        num_slots: tokens that a sequence may have.
    """

    def __init__(
        self,
        embedding: Embedding,
        decoder: Decoder,
        output: VocabularyLoss,
        inputs: EncodedInputs,
        *,
        rows_per_sample: int,
        num_slots: int,
    ) -> None:
        self._embedding, self._decoder, self._output = embedding, decoder, output
        states = inputs.states
        rows = states.shape[0] * rows_per_sample
        self._layers = [layer for layer in decoder.layers if isinstance(layer, DecoderLayer)]
        self._lengths = inputs.lengths
        self._contexts = [layer.cross_attention.to_kv(states) for layer in self._layers]
        heads, dim_head = self._layers[0].self_attention.heads, decoder.rotary.dim
        self._past = [states.new_zeros(2, rows, num_slots, heads, dim_head) for _ in self._layers]
        self._rotation = decoder.rotary.rotation(num_slots, device=states.device, dtype=states.dtype)
        self._position = torch.zeros(1, dtype=torch.int64, device=states.device)
        self._slots = torch.arange(num_slots, device=states.device)
        self._own_rows = torch.arange(rows, device=states.device).unsqueeze(1).expand(rows, num_slots)
        self._source = self._own_rows.clone()

    def step(self, token_ids: Tensor) -> Tensor:
        """Read one more token of each row, (rows,) int64; returns the logits (rows, vocab_size) of the next one."""
        x = self._embedding(token_ids)
        for layer, past, context in zip(self._layers, self._past, self._contexts, strict=True):
            keys, values = past
            self_attention_step(
                layer.self_attention,
                x,
                keys,
                values,
                source=self._source,
                rotation=self._rotation,
                position=self._position,
            )
            cross_attention_step(layer.cross_attention, x, context, self._lengths)
            feed_forward_step(layer.feed_forward, x)
        self._position.add_(1)
        return self._output.logits(self._decoder.norm(x))

    def reorder(self, parents: Tensor) -> None:
        """Row i goes on from what row parents[i] (rows,) int64 has read; no key or value moves."""
        written = self._slots < self._position
        self._source.copy_(torch.where(written, self._source[parents], self._own_rows))

    def past_bytes(self) -> int:
        """Bytes of the keys and values of decoded tokens, at their full number."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self._past)

    def context_bytes(self) -> int:
        """Bytes of the keys and values of the inputs."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self._contexts)
