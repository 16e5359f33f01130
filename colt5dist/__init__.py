"""Pretraining of long-document CoLT5 encoder-decoders.

The names below are loaded when they are first used, so that preparing data needs no model.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from colt5dist.model.causal_colt5 import CausalCoLT5 as CausalCoLT5
    from colt5dist.model.colt5 import CoLT5 as CoLT5
    from colt5dist.model.config import CoLT5Config as CoLT5Config
    from colt5dist.nn.conditional.attention import ConditionalRoutedAttention as ConditionalRoutedAttention
    from colt5dist.nn.conditional.autoregressive_attention import (
        ConditionalRoutedAutoregressiveAttention as ConditionalRoutedAutoregressiveAttention,
    )
    from colt5dist.nn.conditional.autoregressive_block import (
        ConditionalRoutedAutoregressiveBlock as ConditionalRoutedAutoregressiveBlock,
    )
    from colt5dist.nn.conditional.block import ConditionalRoutedTransformerBlock as ConditionalRoutedTransformerBlock
    from colt5dist.nn.conditional.cross_attention import (
        ConditionalRoutedCrossAttention as ConditionalRoutedCrossAttention,
    )
    from colt5dist.nn.conditional.feed_forward import ConditionalRoutedFeedForward as ConditionalRoutedFeedForward
    from colt5dist.nn.conditional.image_attention import (
        ConditionalRoutedImageAttention as ConditionalRoutedImageAttention,
    )
    from colt5dist.nn.routing.router import CoordinateDescentRouter as CoordinateDescentRouter
    from colt5dist.ops.soft_topk import soft_topk as soft_topk
    from colt5dist.ops.topk import topk as topk
    from colt5dist.pretrained.fill import fill as fill
    from colt5dist.pretrained.load import load as load

__version__ = "0.1.0"

_HOMES = {
    "CausalCoLT5": "colt5dist.model.causal_colt5",
    "CoLT5": "colt5dist.model.colt5",
    "CoLT5Config": "colt5dist.model.config",
    "ConditionalRoutedAttention": "colt5dist.nn.conditional.attention",
    "ConditionalRoutedAutoregressiveAttention": "colt5dist.nn.conditional.autoregressive_attention",
    "ConditionalRoutedAutoregressiveBlock": "colt5dist.nn.conditional.autoregressive_block",
    "ConditionalRoutedCrossAttention": "colt5dist.nn.conditional.cross_attention",
    "ConditionalRoutedFeedForward": "colt5dist.nn.conditional.feed_forward",
    "ConditionalRoutedImageAttention": "colt5dist.nn.conditional.image_attention",
    "ConditionalRoutedTransformerBlock": "colt5dist.nn.conditional.block",
    "CoordinateDescentRouter": "colt5dist.nn.routing.router",
    "fill": "colt5dist.pretrained.fill",
    "load": "colt5dist.pretrained.load",
    "soft_topk": "colt5dist.ops.soft_topk",
    "topk": "colt5dist.ops.topk",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'colt5dist' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
