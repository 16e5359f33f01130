"""The model's configuration: sizes, routing, and what is wrong with them."""

import math
from dataclasses import dataclass, fields
from fractions import Fraction

from colt5dist.marks import keeps_result
from colt5dist.nn.routing.router import ROUTINGS
from colt5dist.ops.checks import check_whole, is_number, is_whole_number, not_a_number, not_whole
from colt5dist.ops.soft_topk import soft_topk_problems

ARCHITECTURES = ("encoder_decoder", "causal")
ENCODERS = ("conditional", "dense", "light")
LIGHT_POSITIONS = ("rotary", "relative")
ROUTER_SCORES = ("soft", "straight_through")
MAX_DENOMINATOR = 4096
"""Largest denominator of the fractions that num_heavy_tokens and heavy_key_value_ratio are rounded to."""


@dataclass(kw_only=True)
class CoLT5Config:
    """Sizes and routing of a CoLT5 (arXiv 2303.09752, tables 6 and 7); the defaults are CoLT5-Base in pre-training.

    Args:
        architecture: encoder_decoder: CoLT5; causal: decoder-only (CausalCoLT5), num_decoder_layers conditional layers,
            no encoder.
        vocab_size: rows of the embeddings: the tokenizer's tokens, the sentinels, and padding to a multiple of 128.
        d_model: width of the residual stream.
        num_encoder_layers: encoder layers; 0 with architecture=causal.
        num_decoder_layers: decoder layers.
        head_dim: dimension of every attention head; even (rotary positions).
        num_heads: heads of the decoder and of the dense encoder.
        num_light_heads: heads of the light, local attention.
        num_heavy_heads: heads of the heavy attention among routed tokens.
        light_ff_dim: hidden size of the light feed-forward.
        heavy_ff_dim: hidden size of the heavy feed-forward.
        ff_dim: hidden size of the feed-forward of the decoder and of the dense encoder.
        encoder: conditional: CoLT5; dense: full attention and ordinary feed-forward (T5), the baseline; light: CoLT5's
            light branches alone, a control.
        routing: learned; static: the first token of equal blocks; random: by the sample's number. The last two are
            controls.
        num_heavy_tokens: share of the input, in (0, 1], that the heavy feed-forward sees and that are heavy attention's
            queries.
        heavy_key_value_ratio: routed keys/values for one routed query, above 0.
        light_radius: light attention reaches this many tokens to either side.
        window_size: causal: tokens of a window. Light attention sees the token's own window and the one before; a
            window admits num_heavy_tokens of its tokens to the heavy branches, in the mean heavy_key_value_ratio times
            as many as keys.
        memory_size: causal: admitted keys/values of earlier windows, the newest ones, that heavy attention sees.
        light_positions: positions in light attention: rotary, or relative: T5's learned bias of the distance.
        fetch_k_ratio: sum of the soft scores for one routed token, 1 or more.
        router_scores: soft: the soft scores multiply what the heavy branches read and write; straight_through: 1
            multiplies, with the gradient of the soft scores.
        router_eps: final temperature of the soft top-k, above 0.
        router_n_iters: iterations of coordinate descent.
        router_eps_init: temperature of the first iteration; None: router_eps.
        router_eps_decay: factor of the temperature from one iteration to the next, in (0, 1].
        router_solver: coordinate_descent (the papers'); newton: exact.
        router_implementation: auto: triton on CUDA, scalar elsewhere; reference, scalar, triton: that one.
        router_noise: standard deviation of the normal noise that training adds to the raw scores, which start with
            variance 1; 0: none. Evaluation adds none.
        rope_theta: base of the rotary frequencies.
        norm_eps: added to the mean square in RMSNorm.
        initializer_range: standard deviation of the initial weights but the input embedding's; maps into the residual
            stream have it over sqrt(2 * layers). None: 1 / sqrt(d_model).
        embedding_init_std: standard deviation of the initial input embedding.
        dropout: share of the elements that training drops, in [0, 1): of embedded tokens, of what each sublayer adds,
            of the feed-forwards' hidden units, and of what encoder and decoder put out. Evaluation drops none.
    """

    architecture: str = "encoder_decoder"
    vocab_size: int = 32128
    d_model: int = 768
    num_encoder_layers: int = 12
    num_decoder_layers: int = 12
    head_dim: int = 64
    num_heads: int = 12
    num_light_heads: int = 4
    num_heavy_heads: int = 8
    light_ff_dim: int = 1024
    heavy_ff_dim: int = 8192
    ff_dim: int = 2048
    encoder: str = "conditional"
    routing: str = "learned"
    num_heavy_tokens: float = 0.125
    heavy_key_value_ratio: float = 2.0
    light_radius: int = 127
    window_size: int = 128
    memory_size: int = 1024
    light_positions: str = "rotary"
    fetch_k_ratio: float = 1.125
    router_scores: str = "soft"
    router_eps: float = 1.0
    router_n_iters: int = 50
    router_eps_init: float | None = None
    router_eps_decay: float = 1.0
    router_solver: str = "coordinate_descent"
    router_implementation: str = keeps_result("auto")
    router_noise: float = 0.0
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6
    initializer_range: float | None = keeps_result(None)
    embedding_init_std: float = keeps_result(1.0)
    dropout: float = 0.0

    def problems(self) -> list[str]:
        """What is wrong, one line per key: the key, what is wrong, and what to use. Empty if nothing is."""
        found = self._type_problems()
        if found:
            return found
        positive = (
            "d_model num_decoder_layers head_dim num_heads num_light_heads num_heavy_heads "
            "light_ff_dim heavy_ff_dim ff_dim light_radius window_size memory_size"
        )
        for name in positive.split():
            if getattr(self, name) < 1:
                found.append(f"model.{name}: {getattr(self, name)}; use 1 or more")
        for name in ("rope_theta", "norm_eps", "initializer_range", "embedding_init_std", "heavy_key_value_ratio"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                found.append(f"model.{name}: {value}; use a number above 0")
        if self.architecture == "causal" and self.num_encoder_layers:
            found.append(
                f"model.num_encoder_layers: {self.num_encoder_layers}; architecture=causal has no encoder, use 0"
            )
        if self.architecture == "causal" and self.encoder in ("dense", "light"):
            found.append(
                f"model.encoder: {self.encoder}, but architecture=causal has no encoder; leave it at conditional"
            )
        if self.architecture == "causal" and self.light_positions == "relative":
            found.append("model.light_positions: relative has no form for architecture=causal; use rotary")
        if self.architecture != "causal" and self.num_encoder_layers < 1:
            found.append(f"model.num_encoder_layers: {self.num_encoder_layers}; use 1 or more")
        if not 0 <= self.router_noise < math.inf:
            found.append(f"model.router_noise: {self.router_noise}; use 0 or more")
        if self.architecture == "causal" and self.router_noise:
            found.append("model.router_noise: has no form for architecture=causal; use 0")
        if not 0 <= self.dropout < 1:
            found.append(f"model.dropout: {self.dropout}; use a share in [0, 1), for instance 0.1")
        choices: dict[str, tuple[str, ...]] = {
            "architecture": ARCHITECTURES,
            "encoder": ENCODERS,
            "light_positions": LIGHT_POSITIONS,
            "router_scores": ROUTER_SCORES,
            "routing": ROUTINGS,
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                found.append(f"model.{name}: {getattr(self, name)!r}; use one of {', '.join(allowed)}")
        if self.vocab_size < 1 or self.vocab_size % 128:
            remedy = max(128, math.ceil(self.vocab_size / 128) * 128)
            found.append(f"model.vocab_size: {self.vocab_size} is not a multiple of 128; use {remedy}")
        if self.head_dim % 2:
            found.append(
                f"model.head_dim: {self.head_dim} is odd, rotary positions turn pairs; use {self.head_dim + 1}"
            )
        if not 1 <= self.fetch_k_ratio < math.inf:
            found.append(f"model.fetch_k_ratio: {self.fetch_k_ratio}; use 1 or more")
        router_problems = soft_topk_problems(
            eps=self.router_eps,
            eps_init=self.router_eps_init,
            eps_decay=self.router_eps_decay,
            n_iters=self.router_n_iters,
            solver=self.router_solver,
            implementation=self.router_implementation,
        )
        found += [f"model.router_{problem}" for problem in router_problems]
        return found + self._budget_problems()

    def _type_problems(self) -> list[str]:
        """Fields whose values have another type than their defaults."""
        found = []
        for key in fields(self):
            value = getattr(self, key.name)
            if isinstance(key.default, str):
                if not isinstance(value, str):
                    found.append(f"model.{key.name}: {value!r} is of type {type(value).__name__}; use a string")
            elif isinstance(key.default, int):
                if not is_whole_number(value):
                    found.append(not_whole(f"model.{key.name}", value))
            elif not is_number(value) and not (value is None and key.default is None):
                found.append(not_a_number(f"model.{key.name}", value))
        return found

    def _budget_problems(self) -> list[str]:
        if not 0 < self.num_heavy_tokens <= 1:
            return [f"model.num_heavy_tokens: {self.num_heavy_tokens} is a share of the input; use a number in (0, 1]"]
        if not 0 < self.heavy_key_value_ratio < math.inf:
            return []
        query, key_value = self._shares()
        if query == 0:
            return [f"model.num_heavy_tokens: {self.num_heavy_tokens} is below 1/{MAX_DENOMINATOR}; use more"]
        if key_value == 0:
            return [f"model.heavy_key_value_ratio: {self.heavy_key_value_ratio} is below 1/{MAX_DENOMINATOR}; use more"]
        if key_value > 1:
            remedy = f"use {float(1 / query):g} or less with num_heavy_tokens {self.num_heavy_tokens:g}"
            return [
                f"model.heavy_key_value_ratio: {self.heavy_key_value_ratio} routes more keys than there are; {remedy}"
            ]
        multiple = math.lcm(query.denominator, key_value.denominator)
        if self.architecture == "causal" and self.window_size % multiple:
            remedy = f"use {max(self.window_size // multiple, 1) * multiple}"
            return [
                f"model.window_size: {self.window_size} is not a multiple of {multiple}, which num_heavy_tokens "
                f"{self.num_heavy_tokens:g} needs; {remedy}"
            ]
        return []

    def _shares(self) -> tuple[Fraction, Fraction]:
        """Shares of the input that are routed as queries, and as keys/values."""
        share = Fraction(self.num_heavy_tokens).limit_denominator(MAX_DENOMINATOR)
        ratio = Fraction(self.heavy_key_value_ratio).limit_denominator(MAX_DENOMINATOR)
        return share, share * ratio

    @property
    def weight_std(self) -> float:
        """Standard deviation of the initial weights, but for the input embedding and maps into the residual stream."""
        return self.d_model**-0.5 if self.initializer_range is None else self.initializer_range

    @property
    def input_multiple(self) -> int:
        """Input lengths must be a multiple of this many tokens, so that every budget is a whole number."""
        if self.encoder != "conditional":
            return 1
        query, key_value = self._shares()
        return math.lcm(query.denominator, key_value.denominator)

    def num_routed(self, input_length: int) -> tuple[int, int, int]:
        """Tokens of an input (or a window) that are routed.

        Args:
            input_length: tokens of the input, a multiple of `input_multiple`.

        Returns:
            How many are routed to the heavy feed-forward, as queries, and as keys/values.

        Raises:
            ValueError: input_length is no such multiple.
        """
        check_whole(input_length=input_length)
        if input_length < 1 or input_length % self.input_multiple:
            raise ValueError(f"input length: {input_length} is not a multiple of {self.input_multiple}")
        if self.encoder != "conditional":
            return 0, 0, 0
        query, key_value = self._shares()
        return int(input_length * query), int(input_length * query), int(input_length * key_value)
