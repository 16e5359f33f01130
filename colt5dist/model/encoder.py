"""The encoders: CoLT5's conditional one, T5's dense one as its baseline, and the light branches alone as a control."""

from torch import Tensor, nn

from colt5dist.model.activation_checkpointing import run_layer
from colt5dist.model.config import CoLT5Config
from colt5dist.model.layer_settings import (
    attention_settings,
    dense_attention_settings,
    dense_feed_forward_settings,
    feed_forward_settings,
    head_settings,
    light_attention_settings,
    light_feed_forward_settings,
    router_settings,
)
from colt5dist.model.routing_statistics import LayerRouting, routed_tokens
from colt5dist.nn.attention.local import LocalSelfAttention
from colt5dist.nn.attention.rotary import RotaryEmbedding, Rotation
from colt5dist.nn.attention.self_attention import SelfAttention
from colt5dist.nn.conditional.attention import ConditionalRoutedAttention
from colt5dist.nn.conditional.feed_forward import ConditionalRoutedFeedForward
from colt5dist.nn.dropout import Dropout, drop, parts_of
from colt5dist.nn.feed_forward import FeedForward
from colt5dist.nn.norm import RMSNorm, norm_branch


class ConditionalEncoderLayer(nn.Module):
    """x + conditional attention, then x + conditional feed-forward, with CoLT5's settings (`layer_settings`).

    Light attention has T5's relative bias instead of rotary positions if the configuration asks for it.
    """

    def __init__(self, config: CoLT5Config, *, layer_number: int, seed: int) -> None:
        super().__init__()
        num_layers = config.num_encoder_layers
        # a layer's three routers draw from three streams: queries, keys/values, feed-forward
        stream = 3 * layer_number
        # the budgets follow the input's length: `forward` gives them
        self.attention = ConditionalRoutedAttention(
            config.d_model,
            num_heavy_tokens_q=1,
            num_heavy_tokens_kv=1,
            light_radius=config.light_radius,
            light_rotary_emb=config.light_positions == "rotary",
            light_relative_bias=config.light_positions == "relative",
            **router_settings(config, seed=seed, stream=stream),
            **head_settings(config),
            **attention_settings(config, num_layers),
        )
        self.feed_forward = ConditionalRoutedFeedForward(
            config.d_model,
            num_heavy_tokens=1,
            **router_settings(config, seed=seed, stream=stream + 2),
            **feed_forward_settings(config, num_layers),
        )

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None,
        budgets: tuple[int, int, int],
        rotary_angles: Rotation,
        sample_index: Tensor | None,
        collect_routing: bool,
        dropout: Dropout | None,
    ) -> tuple[Tensor, LayerRouting | None]:
        """Both sublayers with their residuals.

        Args:
            x: (b, n, d_model).
            mask: (b, n) bool, True = valid; None: all.
            budgets: tokens that are routed to the heavy feed-forward, as queries, and as keys/values.
            rotary_angles: of the n positions.
            sample_index: (b,) int64, the samples' numbers; None without random routing.
            collect_routing: whether to return what the routers did.
            dropout: of the layer; None: none.

        Returns:
            x (b, n, d_model), and the routing if collect_routing, else None.
        """
        num_feed_forward, num_query, num_key_value = budgets
        in_attention, in_feed_forward = parts_of(dropout, 2)
        x, query, key_value = self.attention(
            x,
            num_heavy_tokens_q=num_query,
            num_heavy_tokens_kv=num_key_value,
            mask=mask,
            sample_index=sample_index,
            rotary_angles=rotary_angles,
            return_route=True,
            residual=True,
            dropout=in_attention,
        )
        x, feed_forward = self.feed_forward(
            x,
            mask,
            num_feed_forward,
            sample_index=sample_index,
            return_route=True,
            residual=True,
            dropout=in_feed_forward,
        )
        if not collect_routing:
            return x, None
        return x, LayerRouting(routed_tokens(feed_forward), routed_tokens(query), routed_tokens(key_value))


class DenseEncoderLayer(nn.Module):
    """x + full self-attention, then x + feed-forward: T5.1.1's layer, with rotary positions."""

    def __init__(self, config: CoLT5Config) -> None:
        super().__init__()
        num_layers = config.num_encoder_layers
        self.attention = SelfAttention(config.d_model, **dense_attention_settings(config, num_layers))
        self.feed_forward = FeedForward(config.d_model, **dense_feed_forward_settings(config, num_layers))

    def forward(self, x: Tensor, mask: Tensor | None, rotary_angles: Rotation, dropout: Dropout | None) -> Tensor:
        """x (b, n, d_model), mask (b, n) bool, rotary_angles of n positions -> (b, n, d_model)."""
        in_attention, in_feed_forward = parts_of(dropout, 2)
        x = self.attention(x, mask=mask, rotary_angles=rotary_angles, residual=True, dropout=in_attention)
        return self.feed_forward(x, residual=True, dropout=in_feed_forward)


class LightEncoderLayer(nn.Module):
    """x + local attention, then x + feed-forward: the conditional layer without its heavy branches and routers.

    Light attention has T5's relative bias instead of rotary positions if the configuration asks for it.
    """

    def __init__(self, config: CoLT5Config) -> None:
        super().__init__()
        num_layers = config.num_encoder_layers
        self.rotary_positions = config.light_positions == "rotary"
        self.norm = RMSNorm(config.d_model, eps=config.norm_eps)
        self.attention = LocalSelfAttention(config.d_model, **light_attention_settings(config, num_layers))
        self.feed_forward = FeedForward(config.d_model, **light_feed_forward_settings(config, num_layers))

    def forward(self, x: Tensor, mask: Tensor | None, rotary_angles: Rotation, dropout: Dropout | None) -> Tensor:
        """x (b, n, d_model), mask (b, n) bool, rotary_angles of n positions -> (b, n, d_model)."""
        x, normed = norm_branch(self.norm, x, residual=True)
        in_attention, in_feed_forward = parts_of(dropout, 2)
        out = self.attention(normed, mask=mask, rotary_angles=rotary_angles if self.rotary_positions else None)
        return self.feed_forward(x + drop(out, in_attention, 0), residual=True, dropout=in_feed_forward)


UNROUTED_LAYERS = {"dense": DenseEncoderLayer, "light": LightEncoderLayer}
"""Layers without routers, by the name of their encoder."""


class Encoder(nn.Module):
    """Embedded tokens (b, n, d_model) -> normalised encoder states (b, n, d_model) and what the routers did."""

    def __init__(self, config: CoLT5Config, *, activation_checkpointing: str, seed: int) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = activation_checkpointing
        self.conditional = config.encoder == "conditional"
        self.layers = nn.ModuleList(
            ConditionalEncoderLayer(config, layer_number=number, seed=seed)
            if self.conditional
            else UNROUTED_LAYERS[config.encoder](config)
            for number in range(config.num_encoder_layers)
        )
        self.rotary = RotaryEmbedding(config.head_dim, config.rope_theta)
        self.norm = RMSNorm(config.d_model, eps=config.norm_eps)

    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | None,
        sample_index: Tensor | None,
        collect_routing: bool,
        dropout: Dropout | None = None,
    ) -> tuple[Tensor, tuple[LayerRouting, ...]]:
        """mask (b, n) bool, True = valid; sample_index (b,) int64, for random routing; dropout of the encoder."""
        routing: list[LayerRouting] = []
        angles = self.rotary.rotation(x.shape[1], device=x.device, dtype=x.dtype)
        budgets = self.config.num_routed(x.shape[1]) if self.conditional else (0, 0, 0)
        *in_layers, of_ends = parts_of(dropout, len(self.layers) + 1)
        x = drop(x, of_ends, 0)
        for layer, in_layer in zip(self.layers, in_layers, strict=True):
            if not self.conditional:
                x = run_layer(layer, x, mask, angles, in_layer, activation_checkpointing=self.activation_checkpointing)
                continue
            x, layer_routing = run_layer(
                layer,
                x,
                mask,
                budgets,
                angles,
                sample_index,
                collect_routing,
                in_layer,
                activation_checkpointing=self.activation_checkpointing,
            )
            if layer_routing is not None:
                routing.append(layer_routing)
        return drop(self.norm(x), of_ends, 1), tuple(routing)
