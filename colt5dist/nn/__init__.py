"""The layers: routers, conditional feed-forward and attention, and what they are made of."""

from colt5dist.nn.attention import Attention
from colt5dist.nn.autoregressive_block import ConditionalRoutedAutoregressiveBlock
from colt5dist.nn.causal_router import CausalRouter
from colt5dist.nn.conditional_attention import ConditionalRoutedAttention
from colt5dist.nn.conditional_autoregressive_attention import ConditionalRoutedAutoregressiveAttention
from colt5dist.nn.conditional_block import ConditionalRoutedTransformerBlock
from colt5dist.nn.conditional_cross_attention import ConditionalRoutedCrossAttention
from colt5dist.nn.conditional_feed_forward import ConditionalRoutedFeedForward
from colt5dist.nn.conditional_image_attention import ConditionalRoutedImageAttention
from colt5dist.nn.feed_forward import FeedForward
from colt5dist.nn.norm import RMSNorm
from colt5dist.nn.rotary import RotaryEmbedding
from colt5dist.nn.router import CoordinateDescentRouter, RouterReturn
from colt5dist.nn.self_attention import SelfAttention

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
