"""One step of decoding through the layers of the T5 decoder: a new token of each sequence, with fixed shapes.

For inference: nothing here has a gradient, x is changed in place, and ZeRO-3 does not gather the weights.
"""

import torch.nn.functional as F
from torch import Tensor

from colt5dist.nn.attention.multi_query import MultiQueryAttention
from colt5dist.nn.attention.rotary import Rotation
from colt5dist.nn.attention.self_attention import SelfAttention
from colt5dist.nn.feed_forward import FeedForward
from colt5dist.nn.linear import Linear
from colt5dist.ops.decode_attention import attend_to_context, attend_to_past
from colt5dist.ops.gated_gelu import gated_gelu


def self_attention_step(
    layer: SelfAttention,
    x: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    source: Tensor,
    rotation: Rotation,
    position: Tensor,
) -> None:
    """Add causal self-attention's output to x.

    Args:
        layer: the layer, causal, with rotary positions.
        x: (rows, dim), changed here.
        keys: (rows, slots, heads, dim_head), of the tokens before; the new token's are written to slot `position`.
        values: the same.
        source: (rows, slots) int64, the row of the cache that holds what a row has in a slot.
        rotation: of the positions 0 .. slots - 1.
        position: (1,) int64, tokens before this one.
    """
    qkv = layer.to_qkv(layer.norm(x))
    out = attend_to_past(qkv, keys, values, source, rotation.cosine, rotation.sine, position)
    _add_projection(x, layer.to_out, out)


def cross_attention_step(layer: MultiQueryAttention, x: Tensor, context: Tensor, lengths: Tensor) -> None:
    """Add cross-attention's output to x.

    Args:
        layer: the layer.
        x: (b * rows of a sample, dim), changed here; the rows of a sample are neighbours and share its context.
        context: (b, n, 2 * dim_head), keys and values, `layer.to_kv` of the encoder's states.
        lengths: (b,) int64, valid tokens of each context.
    """
    q = layer.to_q(layer.norm(x)).view(context.shape[0], -1, context.shape[2] // 2)
    out = attend_to_context(q, context, lengths)
    _add_projection(x, layer.to_out, out.view(x.shape[0], -1))


def feed_forward_step(layer: FeedForward, x: Tensor) -> None:
    """Add the feed-forward's output to x (rows, dim), changed here."""
    hidden = layer.to_hidden(layer.norm(x))
    _add_projection(x, layer.to_out, gated_gelu(hidden) if layer.gated else F.gelu(hidden))


def _add_projection(x: Tensor, linear: Linear, out: Tensor) -> None:
    """x += linear(out), in one kernel."""
    x.addmm_(out, linear.weight.t())
    if linear.bias is not None:
        x.add_(linear.bias)
