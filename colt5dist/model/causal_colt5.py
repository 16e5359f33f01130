"""A decoder-only language model of conditional layers: no logit depends on a later token by one bit."""

import torch
from torch import Tensor, nn

from colt5dist.model.activation_checkpointing import run_layer
from colt5dist.model.arguments import check_batch, check_ids, check_model_arguments, one_of
from colt5dist.model.colt5 import CoLT5Output
from colt5dist.model.config import CoLT5Config
from colt5dist.model.generation import (
    GenerationSettings,
    check_inputs,
    for_inference,
    grouped,
    sample_numbers,
    search_for,
    together,
    valid_spans,
    without_end,
    write,
)
from colt5dist.model.layer_settings import attention_settings, feed_forward_settings, head_settings, router_settings
from colt5dist.model.pretrained_form import PretrainedForm
from colt5dist.model.routing_statistics import LayerRouting, routed_tokens
from colt5dist.model.vocabulary_loss import VocabularyLoss
from colt5dist.nn.attention.rotary import RotaryEmbedding, Rotation
from colt5dist.nn.checks import check_sample_index
from colt5dist.nn.conditional.autoregressive_block import ConditionalRoutedAutoregressiveBlock
from colt5dist.nn.conditional.autoregressive_decoding import BlockState, block_step, read_block, select_rows
from colt5dist.nn.dropout import Dropout, drop, parts_of
from colt5dist.nn.embedding import Embedding
from colt5dist.nn.norm import RMSNorm
from colt5dist.ops.checks import check_counts


class CausalLayer(nn.Module):
    """`ConditionalRoutedAutoregressiveBlock` with CoLT5's settings (`layer_settings`), those of the encoder's layers.

    Rotary positions in both branches of attention.
    """

    def __init__(self, config: CoLT5Config, *, layer_number: int, seed: int) -> None:
        super().__init__()
        num_feed_forward, num_query, num_key_value = config.num_routed(config.window_size)
        num_layers = config.num_decoder_layers
        self.block = ConditionalRoutedAutoregressiveBlock(
            config.d_model,
            num_heavy_attn_tokens_q=num_query,
            num_heavy_attn_tokens_kv=config.memory_size,
            num_heavy_ff_tokens=num_feed_forward,
            light_window_size=config.window_size,
            # a layer's three routers draw from three streams
            **router_settings(config, seed=seed, stream=3 * layer_number),
            **head_settings(config),
            attention_kwargs={
                "num_admitted_kv": num_key_value,
                "light_rotary_emb": True,
                **attention_settings(config, num_layers),
            },
            ff_kwargs=feed_forward_settings(config, num_layers),
        )

    def forward(
        self,
        x: Tensor,
        rotary_angles: Rotation,
        sample_index: Tensor | None,
        collect_routing: bool,
        dropout: Dropout | None,
    ) -> tuple[Tensor, LayerRouting | None]:
        """x (b, t, d_model), rotary_angles of t positions, sample_index (b,) int64, dropout of the layer.

        Returns x and, if asked for, the routing.
        """
        x, *routes = self.block(
            x, sample_index=sample_index, rotary_angles=rotary_angles, return_route=True, dropout=dropout
        )
        return x, LayerRouting(*map(routed_tokens, routes)) if collect_routing else None


class CausalCoLT5(PretrainedForm):
    """Decoder-only CoLT5: embedding, causal conditional layers, norm, and the loss of the targets.

    The output embedding is not that of the input. No logit depends on a later token by one bit.

    Args:
        config: sizes and routing, with architecture="causal".
        activation_checkpointing: of every layer: "none" keeps all activations; "full" runs each layer again in the
            backward pass; "full_keep_routing" does the same with the routing decisions of the first run.
        seed: seed of random routing and of dropout, used with routing="random" or dropout only.

    Raises:
        TypeError: config is no CoLT5Config, or seed no whole number.
        ValueError: every problem of the configuration, one line each.
    """

    architecture = "causal"

    def __init__(self, config: CoLT5Config, *, activation_checkpointing: str = "none", seed: int = 0) -> None:
        super().__init__()
        check_model_arguments("CausalCoLT5", self.architecture, config, activation_checkpointing, seed)
        self.config = config
        self.seed = seed
        self.activation_checkpointing = activation_checkpointing
        self.embedding = Embedding(config.vocab_size, config.d_model, std=config.embedding_init_std)
        self.layers = nn.ModuleList(
            CausalLayer(config, layer_number=number, seed=seed) for number in range(config.num_decoder_layers)
        )
        self.rotary = RotaryEmbedding(config.head_dim, config.rope_theta)
        self.norm = RMSNorm(config.d_model, eps=config.norm_eps)
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
        """Losses of the targets; the arguments are those of `CoLT5`, so that one trainer serves both.

        Args:
            input_ids: (b, 0): there is no encoder; text to be continued is the beginning of decoder_input_ids.
            decoder_input_ids: (b, t) int64, any t; padding at the end.
            target_ids: (b, t) int64; padding at the end.
            input_mask: (b, 0), unused.
            target_mask: (b, t) bool, True = counts; None: all.
            sample_index: (b,) int64, the samples' numbers, needed for random routing and, in training, for dropout.
            collect_routing: whether to return what the routers did.

        Returns:
            `CoLT5Output`.

        Raises:
            TypeError: an argument is no tensor.
            ValueError: a type, shape or device is wrong, or there are tokens for an encoder.
        """
        check_batch(input_ids, decoder_input_ids, target_ids, input_mask, target_mask, sample_index)
        if input_ids.shape[1]:
            raise ValueError(
                f"input_ids: {input_ids.shape[1]} tokens for an encoder; put them before decoder_input_ids"
            )
        states, routing = self.decode(decoder_input_ids, sample_index=sample_index, collect_routing=collect_routing)
        token_loss, z_loss = self.loss(states, target_ids, target_mask)
        return CoLT5Output(token_loss, z_loss, routing)

    def decode(
        self, decoder_input_ids: Tensor, *, sample_index: Tensor | None = None, collect_routing: bool = False
    ) -> tuple[Tensor, tuple[LayerRouting, ...]]:
        """States of the tokens before the output embedding.

        Args:
            decoder_input_ids: (b, t) int64.
            sample_index: (b,) int64, the samples' numbers, needed for random routing and, in training, for dropout.
            collect_routing: whether to return what the routers did.

        Returns:
            Normalised states (b, t, d_model), and one entry per layer if collect_routing, else none.
        """
        check_ids("decoder_input_ids", decoder_input_ids)
        check_sample_index(sample_index, decoder_input_ids, "decoder_input_ids")
        x = self.embedding(decoder_input_ids)
        angles = self.rotary.rotation(x.shape[1], device=x.device, dtype=x.dtype)
        routing: list[LayerRouting] = []
        *in_layers, of_ends = parts_of(self._dropout(sample_index, decoder_input_ids), len(self.layers) + 1)
        x = drop(x, of_ends, 0)
        for layer, in_layer in zip(self.layers, in_layers, strict=True):
            x, layer_routing = run_layer(
                layer,
                x,
                angles,
                sample_index,
                collect_routing,
                in_layer,
                activation_checkpointing=self.activation_checkpointing,
            )
            if layer_routing is not None:
                routing.append(layer_routing)
        return drop(self.norm(x), of_ends, 1), tuple(routing)

    @torch.no_grad()
    def start_decoding(self, prompt_ids: Tensor) -> tuple[Tensor, list[BlockState]]:
        """Read a prompt in one pass.

        Args:
            prompt_ids: (b, t) int64, t >= 1.

        Returns:
            Logits (b, vocab_size) of the next token, and for each layer what `decode_step` needs of the prompt.
        """
        check_ids("prompt_ids", prompt_ids)
        if prompt_ids.shape[1] < 1:
            raise ValueError("prompt_ids: no token to go on from; begin with the start token")
        x, states = self.embedding(prompt_ids), []
        for layer in self.layers:
            assert isinstance(layer, CausalLayer)
            x, state = read_block(layer.block, x)
            states.append(state)
        return self.loss.logits(self.norm(x[:, -1])), states

    @torch.no_grad()
    def decode_step(self, token_ids: Tensor, states: list[BlockState]) -> Tensor:
        """Read one more token, at a cost that does not grow with the number of tokens so far.

        Args:
            token_ids: (b,) int64, the next token of each sample.
            states: from `start_decoding`; changed to those after this token.

        Returns:
            Logits (b, vocab_size) of the token after: the same as the last position of `decode` over all tokens so far,
            to rounding.
        """
        x = self.embedding(token_ids.unsqueeze(1))
        for layer, state in zip(self.layers, states, strict=True):
            assert isinstance(layer, CausalLayer)
            x = block_step(layer.block, x, state)
        return self.loss.logits(self.norm(x)).squeeze(1)

    def generate(
        self,
        input_ids: Tensor | None = None,
        num_tokens: int | None = None,
        *,
        input_mask: Tensor | None = None,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        num_beams: int = 1,
        length_penalty: float = 1.0,
        num_return_sequences: int = 1,
        seed: int | None = None,
        sample_index: Tensor | None = None,
        generator: torch.Generator | None = None,
        prompt_ids: Tensor | None = None,
    ) -> Tensor:
        """Continue prompts. Arguments and result are those of `CoLT5.generate`, but for the following.

        Prompts of one length are read and continued together, so what is written for a prompt does not depend on the
        others. A step's shapes follow the text, so it is no CUDA graph.

        Args:
            input_ids: (b, t) int64, t >= 1, the prompts, the start token first.
            num_tokens: tokens to write, 0 or more, in place of max_new_tokens: no token ends a text early.
            input_mask: (b, t) bool, True = valid, without padding between valid tokens; None: all.
            max_new_tokens: most tokens for a sequence, the end token (`eos_id`) included.
            temperature: as in `CoLT5.generate`.
            top_k: as in `CoLT5.generate`.
            top_p: as in `CoLT5.generate`.
            num_beams: as in `CoLT5.generate`.
            length_penalty: as in `CoLT5.generate`.
            num_return_sequences: as in `CoLT5.generate`.
            seed: as in `CoLT5.generate`.
            sample_index: (b,) int64, the samples' numbers, by which is drawn; None: 0 to b - 1.
            generator: generator of a seed, in place of one.
            prompt_ids: another name of input_ids.

        Returns:
            The tokens that follow the prompts, (b * num_return_sequences, new tokens) int64.

        Raises:
            TypeError: an argument has the wrong type.
            ValueError: an argument has a wrong value.
        """
        input_ids = one_of("input_ids", input_ids, "prompt_ids", prompt_ids)
        steps = one_of("max_new_tokens", max_new_tokens, "num_tokens", num_tokens)
        if generator is not None:
            one_of("seed", seed, "generator", generator)
            seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
        check_counts(**{"num_tokens" if max_new_tokens is None else "max_new_tokens": steps}, at_least=0)
        settings = GenerationSettings(
            max_new_tokens=max(steps, 1),
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            num_beams=num_beams,
            length_penalty=length_penalty,
            num_return_sequences=num_return_sequences,
            seed=seed,
            pad_id=self.pad_id,
            eos_id=self.eos_id if num_tokens is None else None,
        )
        settings.check(self.config.vocab_size)
        check_inputs("input_ids", input_ids, input_mask, "input_mask", self.loss.weight.device)
        check_sample_index(sample_index, input_ids, "input_ids")
        numbers = sample_numbers(sample_index, input_ids)
        spans = valid_spans("input_ids", input_ids, input_mask, self.config.vocab_size)
        for row, span in enumerate(spans):
            if span.has_gaps:
                raise ValueError(f"input_mask: sample {row} has padding between its tokens; put it at the end")
        if steps == 0:
            return input_ids.new_zeros(input_ids.shape[0] * num_return_sequences, 0)
        parts = []
        with for_inference(self, input_ids.device):
            for rows in grouped([span.end - span.first for span in spans]):
                prompts = torch.stack([input_ids[row, spans[row].first : spans[row].end] for row in rows])
                parts.append((rows, self._continue(prompts, settings, numbers[rows])))
            return without_end(together(parts, len(spans), settings.pad_id), settings)

    def _continue(self, prompts: Tensor, settings: GenerationSettings, sample_index: Tensor) -> Tensor:
        """What is written after prompts (b, t) of one length, (b * num_return_sequences, max_new_tokens)."""
        logits, states = self.start_decoding(prompts)
        search = search_for(settings, sample_index, logits.dtype)
        rows = torch.arange(len(prompts), device=prompts.device).repeat_interleave(settings.rows_per_sample)
        for state in states:
            select_rows(state, rows)

        def step() -> None:
            search.update(self.decode_step(search.tokens, states))
            reorder()

        def reorder() -> None:
            if search.parents is not None:
                for state in states:
                    select_rows(state, search.parents)

        search.update(logits[rows])
        reorder()
        write(step, search, settings.max_new_tokens - 1)
        return search.result()
