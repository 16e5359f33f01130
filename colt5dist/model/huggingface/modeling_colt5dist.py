"""CoLT5 and CausalCoLT5 as models of transformers 5: a thin layer over the installed colt5dist.

An exported folder holds a copy of this file. `AutoModelForSeq2SeqLM` and `AutoModelForCausalLM` run it with
`trust_remote_code=True`. The weights have the names that they have in colt5dist.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput, Seq2SeqLMOutput

from colt5dist import CausalCoLT5, CoLT5, CoLT5Config
from colt5dist.model.generation import encode_inputs, sample_numbers
from colt5dist.nn.attention.relative_bias import RelativeBias

IGNORED = -100
"""Label of a token that does not count in the loss."""
OURS = {
    "max_new_tokens": None,
    "max_length": None,
    "do_sample": False,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": None,
    "num_beams": 1,
    "length_penalty": 1.0,
    "num_return_sequences": 1,
}
"""Arguments of `generate` that colt5dist's own generation has, and what transformers takes where they are missing."""
IDS = ("pad_token_id", "eos_token_id", "bos_token_id", "decoder_start_token_id")
"""Arguments that change nothing where they are those of the model."""
NEUTRAL = {*IDS, "use_cache", "transformers_version"}
"""Settings of a generation configuration that otherwise change nothing."""
DEFAULT_NEW_TOKENS = 20
"""Tokens that are written where nothing says how many, as in transformers."""


class CoLT5TransformersConfig(PreTrainedConfig):
    """Configuration of both models; what colt5dist reads is in `colt5dist`, as launch/export.py wrote it."""

    model_type = "colt5dist"
    colt5dist: dict[str, Any] | None = None
    vocab_size: int = 0
    hidden_size: int = 0
    num_hidden_layers: int = 0
    num_attention_heads: int = 0
    pad_token_id: int | None = None
    eos_token_id: int | None = None
    decoder_start_token_id: int | None = None


class CoLT5PreTrainedModel(PreTrainedModel):
    """What both models have in common: the modules of a colt5dist model, under the same names."""

    config_class = CoLT5TransformersConfig
    main_input_name = "input_ids"
    _supports_sdpa = True

    def __init__(self, config: CoLT5TransformersConfig, model_class: type[nn.Module]) -> None:
        super().__init__(config)
        self._colt5: Any
        settings = (config.colt5dist or {})["settings"]
        model = model_class(CoLT5Config(**settings["model"]), seed=settings["seed"])
        for name, module in model.named_children():
            self.add_module(name, module)
        # not registered: its modules are those of this one, and their names must not change
        object.__setattr__(self, "_colt5", model)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """A module draws its weights where it is made; only a buffer that is not stored has to be written."""
        if isinstance(module, RelativeBias):
            module.reset_buckets()

    def _own_generation(self, given: dict[str, Any]) -> dict[str, Any] | None:
        """Arguments of colt5dist's `generate` that mean what these mean; None where it has no such arguments."""
        given = {name: value for name, value in given.items() if value is not None}
        found = {**self.generation_config.to_diff_dict(), **given}
        if any(found.get(name) not in (None, getattr(self.config, name, None)) for name in IDS):
            return None
        kept = {name for name, value in found.items() if value is not None and not name.startswith("_")} - NEUTRAL
        wanted = {**OURS, **{name: found[name] for name in kept}}
        if set(wanted) != set(OURS) or (wanted["do_sample"] and wanted["num_beams"] > 1):
            return None
        number = wanted.pop("max_new_tokens")
        length = wanted.pop("max_length")
        if not wanted.pop("do_sample"):
            wanted.update(temperature=0.0, top_k=None, top_p=None)
        wanted["top_k"] = wanted["top_k"] or None  # 0 is transformers' word for all tokens
        return {"max_new_tokens": number, "max_length": length, **wanted, "seed": None}

    def get_input_embeddings(self) -> nn.Module:
        """The embedding of input tokens."""
        return self.embedding

    def get_output_embeddings(self) -> None:
        """None: the output embedding is part of the loss, and not tied to the input's."""
        return


class CoLT5ForConditionalGeneration(CoLT5PreTrainedModel, GenerationMixin):
    """The encoder-decoder."""

    def __init__(self, config: CoLT5TransformersConfig) -> None:
        super().__init__(config, CoLT5)
        self.encoder.main_input_name = self.main_input_name  # generation asks for it

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: Any = None,
        *,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **arguments: Any,
    ) -> Any:
        """Write the targets of inputs: from caches, by colt5dist, where it has these arguments, else by transformers.

        Args:
            inputs: (b, n) int64, like input_ids.
            generation_config: of transformers; with one, transformers writes.
            input_ids: (b, n) int64.
            attention_mask: (b, n), 1 = valid; None: all.
            arguments: `OURS`, or any others of transformers.

        Returns:
            (b * num_return_sequences, 1 + new tokens) int64, the start token first.
        """
        ids = inputs if input_ids is None else input_ids
        own = self._own_generation(arguments) if generation_config is None else None
        if ids is not None and attention_mask is None:
            attention_mask = torch.ones_like(ids)  # or transformers would take the start token for padding
        if own is None or ids is None:
            return super().generate(
                ids, generation_config=generation_config, attention_mask=attention_mask, **arguments
            )
        length = own.pop("max_length")
        own["max_new_tokens"] = own["max_new_tokens"] or (length - 1 if length else DEFAULT_NEW_TOKENS)
        mask = None if attention_mask is None else attention_mask.bool()
        self._colt5.pad_id, self._colt5.eos_id = self.config.decoder_start_token_id, self.config.eos_token_id
        return F.pad(self._colt5.generate(ids, input_mask=mask, **own), (1, 0), value=self._colt5.pad_id)

    def get_encoder(self, *_: Any, **__: Any) -> nn.Module:
        """What generation calls once for its inputs."""
        return _EncoderOfGeneration(self)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        labels: Tensor | None = None,
        encoder_outputs: Any = None,
        sample_index: Tensor | None = None,
        **unused: Any,
    ) -> Seq2SeqLMOutput:
        """Logits of the targets, and their mean loss.

        Args:
            input_ids: (b, n) int64, any n: it is padded to the model's multiple.
            attention_mask: (b, n), 1 = valid; None: all.
            decoder_input_ids: (b, t) int64, the start token first; None: made of labels.
            labels: (b, t) int64 targets; those that are -100 do not count.
            encoder_outputs: what the encoder gave for these inputs, instead of input_ids.
            sample_index: (b,) int64, needed by a model with random routing and, in training, by one with dropout or
                noise of the routers.

        Returns:
            logits (b, t, vocab_size), and loss where labels are given.
        """
        if decoder_input_ids is None:
            if labels is None:
                raise ValueError("decoder_input_ids: missing; give them, or labels")
            decoder_input_ids = self._shift_right(labels)
        if encoder_outputs is None:
            if input_ids is None:
                raise ValueError("input_ids: missing; give them, or encoder_outputs")
            states, mask = self._encode(input_ids, attention_mask, sample_index)
        else:
            states = encoder_outputs[0]
            mask = getattr(encoder_outputs, "mask", attention_mask)
            mask = None if mask is None else mask.bool()
        decoded = self._colt5.decode(decoder_input_ids, states, input_mask=mask, sample_index=sample_index)
        logits = self.loss.logits(decoded)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
        return Seq2SeqLMOutput(loss=loss, logits=logits, encoder_last_hidden_state=states)

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        """Decoder inputs for these labels; data collators call it."""
        return self._shift_right(labels)

    def _encode(
        self, input_ids: Tensor, attention_mask: Tensor | None, sample_index: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Encoder states and mask, both padded to the model's multiple."""
        mask = None if attention_mask is None else attention_mask.bool()
        missing = -input_ids.shape[1] % self._colt5.config.input_multiple
        if missing:
            mask = torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask
            input_ids = F.pad(input_ids, (0, missing), value=self.config.pad_token_id or 0)
            mask = F.pad(mask, (0, missing))
        states, _ = self._colt5.encode(input_ids, input_mask=mask, sample_index=sample_index)
        return states, mask

    def _shift_right(self, labels: Tensor) -> Tensor:
        shifted = F.pad(labels[:, :-1], (1, 0), value=self.config.decoder_start_token_id or 0)
        return shifted.masked_fill(shifted == IGNORED, self.config.pad_token_id or 0)


@dataclass
class EncoderStates(BaseModelOutput):
    """Encoder states, and a mask of those that are valid."""

    mask: Tensor | None = None


class _EncoderOfGeneration(nn.Module):
    """The encoder in the form in which transformers' generation calls one."""

    main_input_name = "input_ids"

    def __init__(self, model: CoLT5ForConditionalGeneration) -> None:
        super().__init__()
        self._encode_alone = partial(encode_inputs, model._colt5)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **unused: Any) -> EncoderStates:
        """Encoder states of the inputs, each read as if it were alone in the batch, and where they are valid."""
        mask = None if attention_mask is None else attention_mask.bool()
        states, lengths = self._encode_alone(input_ids, mask, sample_numbers(None, input_ids))
        places = torch.arange(states.shape[1], device=states.device)
        return EncoderStates(last_hidden_state=states, mask=places < lengths.unsqueeze(1))


class CoLT5ForCausalLM(CoLT5PreTrainedModel, GenerationMixin):
    """The decoder-only model."""

    def __init__(self, config: CoLT5TransformersConfig) -> None:
        super().__init__(config, CausalCoLT5)

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: Any = None,
        *,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **arguments: Any,
    ) -> Any:
        """Continue prompts; arguments are those of the encoder-decoder's `generate`.

        Returns:
            (b * num_return_sequences, t + new tokens) int64, the prompt with its padding first.
        """
        ids = inputs if input_ids is None else input_ids
        own = self._own_generation(arguments) if generation_config is None else None
        if ids is not None and attention_mask is None:
            attention_mask = torch.ones_like(ids)  # or transformers would take the start token for padding
        if own is None or ids is None:
            return super().generate(
                ids, generation_config=generation_config, attention_mask=attention_mask, **arguments
            )
        length = own.pop("max_length")
        own["max_new_tokens"] = own["max_new_tokens"] or (length - ids.shape[1] if length else DEFAULT_NEW_TOKENS)
        mask = None if attention_mask is None else attention_mask.bool()
        self._colt5.pad_id, self._colt5.eos_id = self.config.pad_token_id, self.config.eos_token_id
        written = self._colt5.generate(ids, input_mask=mask, **own)
        return torch.cat((ids.repeat_interleave(own["num_return_sequences"], dim=0), written), dim=1)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        sample_index: Tensor | None = None,
        **unused: Any,
    ) -> CausalLMOutput:
        """Logits of the next tokens, and their mean loss.

        Args:
            input_ids: (b, t) int64, the start token first.
            attention_mask: (b, t), 1 = valid; padding may be on either side; None: all.
            labels: (b, t) int64, usually input_ids: position i is compared with the logits of position i - 1; those
                that are -100, or come after padding, do not count.
            sample_index: (b,) int64, needed by a model with random routing and, in training, by one with dropout or
                noise of the routers.

        Returns:
            logits (b, t, vocab_size), and loss where labels are given.
        """
        order = None
        if attention_mask is not None and not bool(attention_mask[:, 0].all()):
            # positions count from the first valid token, so padding before it goes to the end
            order = (attention_mask == 0).to(torch.int8).argsort(dim=1, stable=True)
            input_ids = input_ids.gather(1, order)
        states, _ = self._colt5.decode(input_ids, sample_index=sample_index)
        if order is not None:
            states = torch.empty_like(states).scatter_(1, order.unsqueeze(-1).expand_as(states), states)
        logits = self.loss.logits(states)
        loss = None
        if labels is not None:
            following = labels[:, 1:]
            if attention_mask is not None:
                following = following.masked_fill(attention_mask[:, :-1] == 0, IGNORED)
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), following.flatten(), ignore_index=IGNORED)
        return CausalLMOutput(loss=loss, logits=logits)
