"""The CoLT5 encoder-decoder (arXiv 2303.09752)."""

from typing import NamedTuple

import torch
from torch import Tensor

from colt5dist.model.arguments import check_batch, check_ids, check_model_arguments
from colt5dist.model.config import CoLT5Config
from colt5dist.model.decoder import Decoder
from colt5dist.model.encoder import Encoder
from colt5dist.model.generation import (
    Constraint,
    DecoderState,
    GenerationSettings,
    check_inputs,
    encode_inputs,
    for_inference,
    sample_numbers,
    search_for,
    without_end,
    write_from_start,
)
from colt5dist.model.pretrained_form import PretrainedForm
from colt5dist.model.routing_statistics import LayerRouting
from colt5dist.model.vocabulary_loss import VocabularyLoss
from colt5dist.nn.checks import check_mask, check_sample_index, check_tokens
from colt5dist.nn.dropout import at
from colt5dist.nn.embedding import Embedding


class CoLT5Output(NamedTuple):
    """What a model returns.

    Args:
        token_loss: (b, t) cross-entropy in nats, 0 where masked.
        z_loss: (b, t) squared logsumexp of the logits, 0 where masked.
        routing: one entry per conditional layer if it was asked for, else empty (and empty for the dense encoder).
    """

    token_loss: Tensor
    z_loss: Tensor
    routing: tuple[LayerRouting, ...]


class CoLT5(PretrainedForm):
    """CoLT5: conditional (or dense) encoder, decoder, and the loss of the targets.

    The inputs of encoder and decoder share one embedding; the output has another (arXiv 2303.09752).

    Args:
        config: sizes and routing, with architecture="encoder_decoder".
        activation_checkpointing: of every layer of encoder and decoder: "none" keeps all activations; "full" runs each
            layer again in the backward pass; "full_keep_routing" does the same with the routing decisions of the first
            run.
        seed: seed of random routing, noise of the routers and dropout, used with these only.

    Raises:
        TypeError: config is no CoLT5Config, or seed no whole number.
        ValueError: every problem of the configuration, one line each.
    """

    architecture = "encoder_decoder"

    def __init__(self, config: CoLT5Config, *, activation_checkpointing: str = "none", seed: int = 0) -> None:
        super().__init__()
        check_model_arguments("CoLT5", self.architecture, config, activation_checkpointing, seed)
        self.config = config
        self.seed = seed
        self.embedding = Embedding(config.vocab_size, config.d_model, std=config.embedding_init_std)
        self.encoder = Encoder(config, activation_checkpointing=activation_checkpointing, seed=seed)
        self.decoder = Decoder(config, activation_checkpointing=activation_checkpointing)
        self.loss = VocabularyLoss(config.d_model, config.vocab_size, std=config.weight_std)

    def forward(
        self,
        input_ids: Tensor,
        decoder_input_ids: Tensor,
        target_ids: Tensor,
        *,
        input_mask: Tensor | None = None,
        target_mask: Tensor | None = None,
        sample_index: Tensor | None = None,
        collect_routing: bool = False,
    ) -> CoLT5Output:
        """Losses of the targets.

        Args:
            input_ids: (b, n) int64, n a multiple of `config.input_multiple`.
            decoder_input_ids: (b, t) int64; padding at the end.
            target_ids: (b, t) int64; padding at the end.
            input_mask: (b, n) bool, True = valid; None: all.
            target_mask: (b, t) bool, True = counts; None: all.
            sample_index: (b,) int64, the samples' numbers, needed for random routing and, in training, for dropout and
                for noise of the routers.
            collect_routing: whether to return what the routers did.

        Returns:
            `CoLT5Output`.

        Raises:
            TypeError: an argument is no tensor.
            ValueError: a type, shape or device is wrong, or n is no such multiple.
        """
        check_batch(input_ids, decoder_input_ids, target_ids, input_mask, target_mask, sample_index)
        encoder_states, routing = self.encode(
            input_ids, input_mask=input_mask, sample_index=sample_index, collect_routing=collect_routing
        )
        decoder_states = self.decode(
            decoder_input_ids, encoder_states, input_mask=input_mask, sample_index=sample_index
        )
        token_loss, z_loss = self.loss(decoder_states, target_ids, target_mask)
        return CoLT5Output(token_loss, z_loss, routing)

    def encode(
        self,
        input_ids: Tensor,
        *,
        input_mask: Tensor | None = None,
        sample_index: Tensor | None = None,
        collect_routing: bool = False,
    ) -> tuple[Tensor, tuple[LayerRouting, ...]]:
        """States of the inputs.

        Args:
            input_ids: (b, n) int64, n a multiple of `config.input_multiple`.
            input_mask: (b, n) bool, True = valid; None: all.
            sample_index: (b,) int64, the samples' numbers, needed for random routing and, in training, for dropout and
                for noise of the routers.
            collect_routing: whether to return what the routers did.

        Returns:
            Normalised states (b, n, d_model), and one entry per conditional layer if collect_routing, else none.
        """
        check_ids("input_ids", input_ids)
        check_mask("input_mask", input_mask, input_ids.shape, input_ids, "input_ids")
        check_sample_index(sample_index, input_ids, "input_ids")
        return self.encoder(
            self.embedding(input_ids),
            mask=input_mask,
            sample_index=sample_index,
            collect_routing=collect_routing,
            dropout=at(self._dropout(sample_index, input_ids), 0),
        )

    def decode(
        self,
        decoder_input_ids: Tensor,
        encoder_states: Tensor,
        *,
        input_mask: Tensor | None = None,
        sample_index: Tensor | None = None,
    ) -> Tensor:
        """States of the targets before the output embedding.

        Args:
            decoder_input_ids: (b, t) int64.
            encoder_states: (b, n, d_model), from `encode`.
            input_mask: (b, n) bool, True = valid; None: all.
            sample_index: (b,) int64, the samples' numbers, needed for dropout in training.

        Returns:
            Normalised states (b, t, d_model).
        """
        check_ids("decoder_input_ids", decoder_input_ids)
        check_tokens("encoder_states", encoder_states, self.config.d_model)
        check_mask("input_mask", input_mask, encoder_states.shape[:2], encoder_states, "encoder_states")
        return self.decoder(
            self.embedding(decoder_input_ids),
            encoder_states,
            encoder_mask=input_mask,
            dropout=at(self._dropout(sample_index, decoder_input_ids), 1),
        )

    def generate(
        self,
        input_ids: Tensor,
        *,
        input_mask: Tensor | None = None,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        num_beams: int = 1,
        length_penalty: float = 1.0,
        num_return_sequences: int = 1,
        seed: int | None = None,
        sample_index: Tensor | None = None,
        constraint: Constraint | None = None,
        cuda_graph: bool = True,
    ) -> Tensor:
        """Write the targets of inputs of any length.

        The encoder runs once, the decoder a token at a time from caches. An input is read as if it were alone: what is
        written for it does not depend on the other inputs or on padding, but for rounding. Computed in the type of the
        weights, in eval mode, outside of ZeRO-3.

        Args:
            input_ids: (b, n) int64, any n of 1 or more, on the model's device.
            input_mask: (b, n) bool, True = valid; None: all.
            max_new_tokens: most tokens for a sequence, the end token (`eos_id`) included.
            temperature: 0: the likeliest token each time; above 0: drawn from softmax(logits / temperature).
            top_k: only the k likeliest tokens are drawn; None: all.
            top_p: only the likeliest tokens whose probabilities, after top_k, first reach this sum are drawn.
            num_beams: above 1: beam search with so many beams, by the rules of `generation/beams.py`.
            length_penalty: a beam's score is the sum of its log-probabilities over length ** length_penalty.
            num_return_sequences: sequences for each input: drawn independently, or the best beams, best first.
            seed: of the draws, which depend on nothing else but the sample's number; None: drawn by PyTorch.
            sample_index: (b,) int64, the samples' numbers, by which is drawn and, with random routing, routed; None: 0
                to b - 1. With the numbers of a whole data set the text is the same however it is cut into batches.
            constraint: which tokens are allowed; None: all.
            cuda_graph: on a GPU, whether a step becomes a CUDA graph.

        Returns:
            (b * num_return_sequences, new tokens) int64, those of an input next to each other, padded with `pad_id`
            after the end token; as many columns as the longest one needs.

        Raises:
            TypeError: an argument has the wrong type.
            ValueError: an argument has a wrong value, or an input has no valid token.
        """
        settings = GenerationSettings(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            num_beams=num_beams,
            length_penalty=length_penalty,
            num_return_sequences=num_return_sequences,
            seed=seed,
            pad_id=self.pad_id,
            eos_id=self.eos_id,
        )
        settings.check(self.config.vocab_size)
        device, dtype = self.loss.weight.device, self.loss.weight.dtype
        check_inputs("input_ids", input_ids, input_mask, "input_mask", device)
        check_sample_index(sample_index, input_ids, "input_ids")
        numbers = sample_numbers(sample_index, input_ids)
        with for_inference(self, device):
            state = DecoderState(
                self.embedding,
                self.decoder,
                self.loss,
                encode_inputs(self, input_ids, input_mask, numbers),
                rows_per_sample=settings.rows_per_sample,
                num_slots=max_new_tokens,
            )
            search = search_for(settings, numbers, _logits_type(dtype), constraint)
            return without_end(write_from_start(state, search, max_new_tokens, graph=cuda_graph), settings)


def _logits_type(dtype: torch.dtype) -> torch.dtype:
    """Type of the logits of weights of this type."""
    return dtype if dtype == torch.float64 else torch.float32
