"""Parameter groups and the optimizer that DeepSpeed wraps."""

import torch
from torch import nn

from colt5dist.train.config.schema import OptimizerConfig

UNDECAYED = ("norm", "embedding", "rout", "bias", "loss.weight")
"""Parameters whose name contains one of these are not decayed, nor are vectors; bias: also the table of relative
positions; loss.weight: the output embedding."""


def is_decayed(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies: matrices, but not norms, embeddings, biases and routing vectors."""
    shape = getattr(parameter, "ds_shape", parameter.shape)  # at ZeRO stage 3 the tensor itself is empty
    return len(shape) >= 2 and not any(word in name for word in UNDECAYED)


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimizer over two groups, decayed and not."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    decayed = [p for name, p in named if is_decayed(name, p)]
    undecayed = [p for name, p in named if not is_decayed(name, p)]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": undecayed, "weight_decay": 0.0},
    ]
    if config.name == "adafactor":
        return torch.optim.Adafactor(groups, lr=config.lr)
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)
