"""CoLT5's choices for its layers (arXiv 2303.09752), as keyword arguments: the encoder and the causal model share them.

Scores multiply, those of keys/values the heavy branch's input (`router_scores=straight_through`: 1 multiplies); gated
GELU without bias; no null tokens; one RMSNorm before each routed layer. Our choice where the paper is silent: rotary
positions.
"""

import math
from typing import Any

from colt5dist.model.config import CoLT5Config


def weight_settings(config: CoLT5Config, num_layers: int) -> dict[str, Any]:
    """Norm and initial weights of a layer that adds to the residual stream, in a stack of `num_layers` layers."""
    return {
        "norm_eps": config.norm_eps,
        "std": config.weight_std,
        "output_std": config.weight_std / math.sqrt(2 * num_layers),
    }


def router_settings(config: CoLT5Config, *, seed: int, stream: int) -> dict[str, Any]:
    """The routers of a conditional layer.

    Args:
        config: the model's configuration.
        seed: seed of random routing and of the routers' noise.
        stream: the layer's first stream of random numbers; each route of the layer draws from a stream of its own.
    """
    return {
        "router_straight_through": config.router_scores == "straight_through",
        "router_kwargs": {
            "n_iters": config.router_n_iters,
            "fetch_k_ratio": config.fetch_k_ratio,
            "eps": config.router_eps,
            "eps_init": config.router_eps_init,
            "eps_decay": config.router_eps_decay,
            "routing": config.routing,
            "solver": config.router_solver,
            "implementation": config.router_implementation,
            # the routers read normalised tokens: their scores start with variance 1
            "std": config.d_model**-0.5,
            "random_seed": seed,
            "random_stream": stream,
            "noise": config.router_noise,
        },
    }


def head_settings(config: CoLT5Config) -> dict[str, Any]:
    """Heads, scores and null queries of conditional attention, which a block takes by the same names."""
    return {
        "light_dim_head": config.head_dim,
        "light_heads": config.num_light_heads,
        "heavy_dim_head": config.head_dim,
        "heavy_heads": config.num_heavy_heads,
        "multiply_keys_by_score": True,
        "use_null_q_tokens": False,
    }


def attention_settings(config: CoLT5Config, num_layers: int) -> dict[str, Any]:
    """Conditional attention, beside `head_settings`, in a stack of `num_layers` layers."""
    return {
        "use_null_kv": False,
        "rotary_emb": True,
        "rope_theta": config.rope_theta,
        "shared_norm": True,
        **weight_settings(config, num_layers),
    }


def feed_forward_settings(config: CoLT5Config, num_layers: int) -> dict[str, Any]:
    """Conditional feed-forward in a stack of `num_layers` layers."""
    return {
        "light_hidden_dim": config.light_ff_dim,
        "heavy_hidden_dim": config.heavy_ff_dim,
        "gated": True,
        "bias": False,
        "shared_norm": True,
        **weight_settings(config, num_layers),
    }


def dense_attention_settings(config: CoLT5Config, num_layers: int) -> dict[str, Any]:
    """T5.1.1's self-attention, of the decoder and of the dense encoder, with the norm before it."""
    return {
        "dim_head": config.head_dim,
        "heads": config.num_heads,
        "prenorm": True,
        **weight_settings(config, num_layers),
    }


def dense_feed_forward_settings(config: CoLT5Config, num_layers: int) -> dict[str, Any]:
    """T5.1.1's feed-forward, of the decoder and of the dense encoder, with the norm before it."""
    return {"hidden_dim": config.ff_dim, "gated": True, "bias": False, **weight_settings(config, num_layers)}


def light_attention_settings(config: CoLT5Config, num_layers: int) -> dict[str, Any]:
    """The light branch of conditional attention by itself, without a norm before it."""
    weights = weight_settings(config, num_layers)
    return {
        "dim_head": config.head_dim,
        "heads": config.num_light_heads,
        "radius": config.light_radius,
        "prenorm": False,
        "relative_bias": config.light_positions == "relative",
        "std": weights["std"],
        "output_std": weights["output_std"],
    }


def light_feed_forward_settings(config: CoLT5Config, num_layers: int) -> dict[str, Any]:
    """The light branch of the conditional feed-forward by itself, with the norm before it."""
    return {"hidden_dim": config.light_ff_dim, "gated": True, "bias": False, **weight_settings(config, num_layers)}
