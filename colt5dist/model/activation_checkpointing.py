"""Recomputing a layer's activations in the backward pass, with or without its routing decisions."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from colt5dist.nn.routing_memory import keep_routing_decisions

ACTIVATION_CHECKPOINTING = ("none", "full", "full_keep_routing")


def run_layer(layer: Callable[..., Any], *args: Any, activation_checkpointing: str) -> Any:
    """layer(*args), whose inner activations are kept as `activation_checkpointing` says.

    none: all are kept. full: none are, the layer runs again in the backward pass. full_keep_routing: the same, but the
    soft scores and the picked positions are those of the first run, for a near-tie that falls the other way in the
    second would give silently wrong gradients. The three give the same gradients, bit for bit, wherever the operators
    are deterministic.
    """
    if activation_checkpointing == "none" or not torch.is_grad_enabled():
        return layer(*args)
    if activation_checkpointing == "full_keep_routing":
        return checkpoint(layer, *args, use_reentrant=False, context_fn=keep_routing_decisions)
    return checkpoint(layer, *args, use_reentrant=False)
