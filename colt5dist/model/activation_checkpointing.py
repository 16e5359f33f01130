"""Recomputing a layer's activations in the backward pass, with or without its routing decisions."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

ACTIVATION_CHECKPOINTING = ("none", "full", "full_keep_routing")
# registered operators whose results are the routing decision
_ROUTING_OPERATORS = ("soft_topk", "select_topk")


def _keep_routing(_context: Any, operator: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    namespace, _, name = operator.name().partition("::")
    if namespace == "colt5dist" and name.startswith(_ROUTING_OPERATORS):
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def run_layer(layer: Callable[..., Any], *args: Any, activation_checkpointing: str, **kwargs: Any) -> Any:
    """layer(*args, **kwargs), whose inner activations are kept as `activation_checkpointing` says.

    none: all are kept. full: none are, the layer runs again in the backward pass. full_keep_routing: the same, but the
    soft scores and the picked positions are those of the first run, for a near-tie that falls the other way in the
    second would give silently wrong gradients. The three give the same gradients, bit for bit, wherever the operators
    are deterministic.
    """
    if activation_checkpointing == "none" or not torch.is_grad_enabled():
        return layer(*args, **kwargs)
    if activation_checkpointing == "full_keep_routing":
        context = partial(create_selective_checkpoint_contexts, _keep_routing)
        return checkpoint(layer, *args, use_reentrant=False, context_fn=context, **kwargs)
    return checkpoint(layer, *args, use_reentrant=False, **kwargs)
