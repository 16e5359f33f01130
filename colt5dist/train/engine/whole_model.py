"""A copy of a model with whole weights, for ZeRO stage 3, where each rank has but a share of every weight."""

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from colt5dist.errors import ConfigError
from colt5dist.nn.attention.relative_bias import RelativeBias
from colt5dist.train.ranks import sum_over_ranks


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

    Raises:
        ConfigError: on all ranks, if some rank has no room for it.
    """
    own: Any = module
    parameters: dict[str, Any] = dict(own.named_parameters())
    dtype = next(iter(parameters.values())).ds_tensor.dtype
    with torch.device("meta"):
        copy: Any = type(own)(replace(own.config), seed=own.seed)
    copy.to(dtype)
    has_room = torch.ones(1)
    try:
        copy.to_empty(device=device)
    except torch.OutOfMemoryError:
        has_room.zero_()
    if int(sum_over_ranks(has_room.to(device))) < dist.get_world_size():
        gib = sum(p.numel() * p.element_size() for p in copy.parameters()) / 2**30
        raise ConfigError(
            f"train.eval_generate_samples: at zero.stage=3 each GPU needs {gib:.1f} GiB more for whole weights, and "
            "one has no room; set 0, or lower train.micro_batch_size"
        )
    for name, whole in copy.named_parameters():
        share = parameters[name].ds_tensor.data.to(device)
        gathered = share.new_empty(share.numel() * dist.get_world_size())
        dist.all_gather_into_tensor(gathered, share)
        whole.copy_(gathered[: whole.numel()].view(whole.shape))
    for part in copy.modules():
        if isinstance(part, RelativeBias):
            part.reset_buckets()
    copy.pad_id, copy.eos_id = own.pad_id, own.eos_id
    return copy.eval().requires_grad_(False)
