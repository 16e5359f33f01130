"""Parameter groups, and the optimizer that DeepSpeed wraps."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from colt5dist.nn.attention.attention import KeyValueProjection
from colt5dist.nn.feed_forward import FeedForward
from colt5dist.train.config.schema import OptimizerConfig
from colt5dist.train.optimizer.muon import MOMENTUM, Matrix, Muon

UNDECAYED = ("norm", "embedding", "rout", "bias", "loss.weight")
"""Parameters whose name contains one of these are not decayed, nor are vectors; bias: also the table of relative
positions; loss.weight: the output embedding."""
ROUTING_VECTORS = "routing_tokens"
"""Part of the names of the routing vectors."""
LR_FACTOR = "lr_factor"
"""Key of a parameter group: what the run's learning rate is multiplied by for it."""
ADAMW_MOMENTS = ("exp_avg", "exp_avg_sq")
"""Keys of AdamW's states that are as large as the parameter."""


def shape_of(parameter: nn.Parameter) -> tuple[int, ...]:
    """Shape of a parameter; at ZeRO stage 3 the tensor itself is empty."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def is_projection(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a parameter is a matrix of an attention or feed-forward layer: these are decayed, and Muon's.

    Not norms, embeddings, the output map, biases (also of relative positions) and routing vectors.
    """
    return len(shape) >= 2 and not any(word in name for word in UNDECAYED)


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimizer over the projections, all else, and, where their rate is another one, the routing vectors."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    projections = [p for name, p in named if is_projection(name, shape_of(p))]
    # with a factor of 1 a group of their own would only be one more tensor to step on
    routers = {name: p for name, p in named if ROUTING_VECTORS in name and config.router_lr_factor != 1}
    others = [p for name, p in named if not is_projection(name, shape_of(p)) and name not in routers]
    own_rate: list[dict[str, Any]] = []
    if routers:
        own_rate = [{"params": list(routers.values()), "weight_decay": 0.0, LR_FACTOR: config.router_lr_factor}]
    betas = (config.beta1, config.beta2)
    if config.name == "muon":
        return Muon(
            projections,
            others,
            other_groups=own_rate,
            lr=config.lr,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            betas=betas,
            eps=config.eps,
        )
    groups = [
        {"params": projections, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
        *own_rate,
    ]
    if config.name == "adafactor":
        return torch.optim.Adafactor(groups, lr=config.lr)
    return torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=config.eps, fused=True)


def moment_keys(group: Mapping[str, object]) -> tuple[str, ...]:
    """Keys of the states that AdamW or Muon keep for the tensors of a parameter group, each as large as the tensor."""
    return (MOMENTUM,) if group.get("is_muon") else ADAMW_MOMENTS


def num_moments(shapes: Mapping[str, tuple[int, ...]], config: OptimizerConfig) -> int:
    """Float32 numbers that an optimizer keeps besides the weights: AdamW two a parameter, Muon one for a matrix.

    Adafactor's, which are fewer than AdamW's, count as AdamW's.

    Args:
        shapes: name and shape of every parameter.
        config: section `optimizer` of the configuration.
    """
    has_muon = config.name == "muon"
    return sum(
        math.prod(shape) * (1 if has_muon and is_projection(name, shape) else 2) for name, shape in shapes.items()
    )


def muon_matrices(model: nn.Module) -> dict[str, Matrix]:
    """The matrices that are Muon's, by name, and how their rows are shared by several linear maps.

    Queries, keys and values are orthogonalised each by itself, all heads of each together; so are the two halves of a
    gated feed-forward layer's first matrix.
    """
    found = {}
    for name, parameter in model.named_parameters():
        shape = shape_of(parameter)
        if is_projection(name, shape):
            rows, columns = shape
            found[name] = Matrix(rows, columns, *_rows_of_maps(model, name))
    return found


def _rows_of_maps(model: nn.Module, name: str) -> tuple[int, int]:
    """How often the maps of a projection alternate in its rows, and how many they are."""
    layer_name, part, _ = name.rsplit(".", 2)
    layer = model.get_submodule(layer_name)
    projection = layer.get_submodule(part)
    if isinstance(projection, KeyValueProjection):
        return projection.heads, 2
    gated = isinstance(layer, FeedForward) and layer.gated
    return 1, {"to_qkv": 3, "to_kv": 2, "to_hidden": 2 if gated else 1}.get(part, 1)
