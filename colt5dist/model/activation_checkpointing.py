"""Recomputing a layer's activations in the backward pass, with or without its routing decisions."""

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

ACTIVATION_CHECKPOINTING = ("none", "full", "full_keep_routing")
# registered operators whose results are the routing decision
_ROUTING_OPERATORS = ("colt5dist::soft_topk", "colt5dist::select_topk")


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
        return checkpoint(layer, *args, use_reentrant=False, context_fn=_routing_contexts, **kwargs)
    return checkpoint(layer, *args, use_reentrant=False, **kwargs)


def _routing_contexts() -> tuple["_KeepRouting", "_ReplayRouting"]:
    """Contexts of the first run and of the second.

    PyTorch's `create_selective_checkpoint_contexts` would do, but it refuses every operator in the second run that it
    has not seen in the first, and ZeRO-3 gathers parameters in another pattern there.
    """
    kept: deque[Any] = deque()
    return _KeepRouting(kept), _ReplayRouting(kept)


class _KeepRouting(TorchDispatchMode):
    """Notes the results of the routing operators, in order."""

    def __init__(self, kept: deque[Any]) -> None:
        super().__init__()
        self.kept = kept

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.name().startswith(_ROUTING_OPERATORS):
            self.kept.append((func, tree_map_only(torch.Tensor, torch.Tensor.detach, result)))
        return result


class _ReplayRouting(TorchDispatchMode):
    """Gives the noted results instead of running the routing operators again."""

    def __init__(self, kept: deque[Any]) -> None:
        super().__init__()
        self.kept = kept

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.name().startswith(_ROUTING_OPERATORS):
            return func(*args, **(kwargs or {}))
        kept_func, result = self.kept.popleft()
        assert kept_func is func, f"{func} in the second run, {kept_func} in the first"
        return result
