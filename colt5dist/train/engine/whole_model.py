"""A copy of a model with whole weights, for ZeRO stage 3, where each rank has but a share of every weight."""

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from colt5dist.nn.attention.relative_bias import RelativeBias


@torch.no_grad()
def whole_copy(module: nn.Module, device: torch.device) -> nn.Module:
    """Return a copy of a model under ZeRO stage 3 that any rank can use without the others; collective.

    It takes the memory of all weights in their own number format. What is taken from DeepSpeed 0.19.8: `ds_tensor`, a
    parameter's share, which may end in padding, and may be in host memory.

    Args:
        module: the model, `CoLT5` or `CausalCoLT5`.
        device: where to put the copy.

    Returns:
        The copy, in evaluation mode, without gradients.
    """
    parameters: dict[str, Any] = dict(module.named_parameters())
    dtype = next(iter(parameters.values())).ds_tensor.dtype
    own: Any = module
    with torch.device("meta"):
        copy: nn.Module = type(own)(replace(own.config))
    copy.to(dtype).to_empty(device=device)
    for name, whole in copy.named_parameters():
        share = parameters[name].ds_tensor.data.to(device)
        gathered = share.new_empty(share.numel() * dist.get_world_size())
        dist.all_gather_into_tensor(gathered, share)
        whole.copy_(gathered[: whole.numel()].view(whole.shape))
    for part in copy.modules():
        if isinstance(part, RelativeBias):
            part.reset_buckets()
    return copy.eval().requires_grad_(False)
