"""The decoder: T5.1.1's, with multi-query cross-attention."""

from torch import Tensor, nn

from colt5dist.model.activation_checkpointing import run_layer
from colt5dist.model.config import CoLT5Config
from colt5dist.model.layer_settings import dense_attention_settings, dense_feed_forward_settings, weight_settings
from colt5dist.nn.attention.multi_query import MultiQueryAttention
from colt5dist.nn.attention.rotary import RotaryEmbedding, Rotation
from colt5dist.nn.attention.self_attention import SelfAttention
from colt5dist.nn.dropout import Dropout, drop, parts_of
from colt5dist.nn.feed_forward import FeedForward
from colt5dist.nn.norm import RMSNorm


class DecoderLayer(nn.Module):
    """x + causal self-attention, x + multi-query cross-attention, x + gated feed-forward, each on RMSNorm of x."""

    def __init__(self, config: CoLT5Config) -> None:
        super().__init__()
        num_layers = config.num_decoder_layers
        self.self_attention = SelfAttention(config.d_model, causal=True, **dense_attention_settings(config, num_layers))
        self.cross_attention = MultiQueryAttention(
            config.d_model,
            dim_head=config.head_dim,
            heads=config.num_heads,
            **weight_settings(config, num_layers),
        )
        self.feed_forward = FeedForward(config.d_model, **dense_feed_forward_settings(config, num_layers))

    def forward(
        self,
        x: Tensor,
        encoder_states: Tensor,
        encoder_mask: Tensor | None,
        rotary_angles: Rotation,
        dropout: Dropout | None,
    ) -> Tensor:
        """x (b, t, d_model), encoder_states (b, n, d_model), encoder_mask (b, n) bool, rotary_angles of t positions."""
        in_self_attention, in_cross_attention, in_feed_forward = parts_of(dropout, 3)
        x = self.self_attention(x, rotary_angles=rotary_angles, residual=True, dropout=in_self_attention)
        x = self.cross_attention(x, encoder_states, mask=encoder_mask, residual=True, dropout=in_cross_attention)
        return self.feed_forward(x, residual=True, dropout=in_feed_forward)


class Decoder(nn.Module):
    """Embedded tokens (b, t, d_model) and encoder states -> normalised decoder states (b, t, d_model).

    Rotary positions in self-attention only. Padding is at the end of the targets, where causal attention cannot see it:
    there is no mask for it.
    """

    def __init__(self, config: CoLT5Config, *, activation_checkpointing: str) -> None:
        super().__init__()
        self.activation_checkpointing = activation_checkpointing
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_decoder_layers))
        self.rotary = RotaryEmbedding(config.head_dim, config.rope_theta)
        self.norm = RMSNorm(config.d_model, eps=config.norm_eps)

    def forward(
        self, x: Tensor, encoder_states: Tensor, *, encoder_mask: Tensor | None, dropout: Dropout | None = None
    ) -> Tensor:
        """encoder_states (b, n, d_model), encoder_mask (b, n) bool, True = valid; dropout of the decoder."""
        angles = self.rotary.rotation(x.shape[1], device=x.device, dtype=x.dtype)
        *in_layers, of_ends = parts_of(dropout, len(self.layers) + 1)
        x = drop(x, of_ends, 0)
        for layer, in_layer in zip(self.layers, in_layers, strict=True):
            x = run_layer(
                layer,
                x,
                encoder_states,
                encoder_mask,
                angles,
                in_layer,
                activation_checkpointing=self.activation_checkpointing,
            )
        return drop(self.norm(x), of_ends, 1)
