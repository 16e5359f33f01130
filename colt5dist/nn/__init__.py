"""The layers: routers, conditional feed-forward and attention, and what they are made of."""

from colt5dist.nn.attention.attention import Attention
from colt5dist.nn.attention.rotary import RotaryEmbedding
from colt5dist.nn.attention.self_attention import SelfAttention
from colt5dist.nn.conditional.attention import ConditionalRoutedAttention
from colt5dist.nn.conditional.autoregressive_attention import ConditionalRoutedAutoregressiveAttention
from colt5dist.nn.conditional.autoregressive_block import ConditionalRoutedAutoregressiveBlock
from colt5dist.nn.conditional.block import ConditionalRoutedTransformerBlock
from colt5dist.nn.conditional.cross_attention import ConditionalRoutedCrossAttention
from colt5dist.nn.conditional.feed_forward import ConditionalRoutedFeedForward
from colt5dist.nn.conditional.image_attention import ConditionalRoutedImageAttention
from colt5dist.nn.feed_forward import FeedForward
from colt5dist.nn.norm import RMSNorm
from colt5dist.nn.routing.causal_router import CausalRouter
from colt5dist.nn.routing.router import CoordinateDescentRouter, RouterReturn

__all__ = [
    "Attention",
    "CausalRouter",
    "ConditionalRoutedAttention",
    "ConditionalRoutedAutoregressiveAttention",
    "ConditionalRoutedAutoregressiveBlock",
    "ConditionalRoutedCrossAttention",
    "ConditionalRoutedFeedForward",
    "ConditionalRoutedImageAttention",
    "ConditionalRoutedTransformerBlock",
    "CoordinateDescentRouter",
    "FeedForward",
    "RMSNorm",
    "RotaryEmbedding",
    "RouterReturn",
    "SelfAttention",
]
