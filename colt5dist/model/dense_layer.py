"""T5.1.1's self-attention and feed-forward, of which the dense encoder's and the decoder's layers are built."""

import math
from typing import Any

from colt5dist.model.config import CoLT5Config
from colt5dist.nn.attention.self_attention import SelfAttention
from colt5dist.nn.feed_forward import FeedForward


def weight_settings(config: CoLT5Config, num_layers: int) -> dict[str, Any]:
    """Keywords of a module with a norm and a map into the residual stream, in a stack of `num_layers` layers."""
    return {
        "norm_eps": config.norm_eps,
        "std": config.initializer_range,
        "output_std": config.initializer_range / math.sqrt(2 * num_layers),
    }


def dense_self_attention(config: CoLT5Config, num_layers: int, *, causal: bool) -> SelfAttention:
    """Self-attention with `num_heads` heads, the norm before it."""
    weights = weight_settings(config, num_layers)
    return SelfAttention(config.d_model, config.head_dim, config.num_heads, prenorm=True, causal=causal, **weights)


def dense_feed_forward(config: CoLT5Config, num_layers: int) -> FeedForward:
    """Gated GELU without bias, `ff_dim` wide, the norm before it."""
    weights = weight_settings(config, num_layers)
    return FeedForward(config.d_model, hidden_dim=config.ff_dim, gated=True, bias=False, **weights)
