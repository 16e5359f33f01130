"""Recomputing a layer's activations in the backward pass, with or without its routing decisions."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from colt5dist.nn.routing.kept_routing import compiled_routing_policy, keep_routing_decisions

ACTIVATION_CHECKPOINTING = ("none", "full", "full_keep_routing")


def run_layer(layer: Callable[..., Any], *args: Any, activation_checkpointing: str) -> Any:
    """Run layer(*args), keeping its inner activations for the backward pass or computing them again.

    The three settings give the same gradients, bit for bit, wherever the operators are deterministic, also inside
    `torch.compile`. Around a compiled layer full_keep_routing does what full does; there the second run is the same
    compiled code on the same numbers.

    Args:
        layer: the layer.
        args: its positional arguments.
        activation_checkpointing: "none": all activations are kept. "full": none are, the layer runs again in the
            backward pass. "full_keep_routing": the same, but the soft scores and the picked positions are those of the
            first run, for a near-tie that falls the other way in the second would give silently wrong gradients.

    Returns:
        What the layer returns.
    """
    if activation_checkpointing == "none" or not torch.is_grad_enabled():
        return layer(*args)
    # layers draw no random numbers from PyTorch's generators, whose state a CUDA graph cannot record
    run = partial(checkpoint, layer, *args, use_reentrant=False, preserve_rng_state=False)
    if activation_checkpointing == "full_keep_routing":
        if torch.compiler.is_compiling():
            return run(context_fn=partial(create_selective_checkpoint_contexts, compiled_routing_policy))
        return run(context_fn=keep_routing_decisions)
    return run()
