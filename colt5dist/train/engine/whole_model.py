"""A copy of a model with whole weights, for ZeRO stage 3, where each rank has but a share of every weight."""

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from colt5dist.errors import ConfigError
from colt5dist.nn.attention.relative_bias import RelativeBias
from colt5dist.train.ranks import sum_over_ranks


class NoRoomError(ConfigError):
    """Some rank has no room for a copy with whole weights.

    Args:
        num_bytes: the memory that the copy takes.
    """

    def __init__(self, num_bytes: int) -> None:
        self.gib = num_bytes / 2**30
        super().__init__(
            f"train.eval_generate_samples: at zero.stage=3 each GPU needs {self.gib:.1f} GiB more for whole weights, "
            "and one has no room; set 0, or lower train.micro_batch_size"
        )


@torch.no_grad()
def whole_copy(module: nn.Module, device: torch.device, *, wanted: bool = True) -> nn.Module | None:
    """Return a copy of a model under ZeRO stage 3 that any rank can use without the others; collective.

    It takes the memory of all weights in their own number format, where it is wanted; on every rank, for a moment, that
    of the largest weight. What is taken from DeepSpeed 0.19.8: `ds_tensor`, a parameter's share, which may end in
    padding, and may be in host memory.

    Args:
        module: the model, `CoLT5` or `CausalCoLT5`.
        device: where to put the copy.
        wanted: whether this rank wants one; the others help it to theirs.

    Returns:
        The copy, in evaluation mode, without gradients; None where it is not wanted.

    Raises:
        NoRoomError: on all ranks, if some rank has no room for it.
    """
    own: Any = module
    shares: dict[str, torch.Tensor] = {name: p.ds_tensor for name, p in own.named_parameters()}
    first, world_size = next(iter(shares.values())), dist.get_world_size()
    with torch.device("meta"):
        copy: Any = type(own)(replace(own.config), seed=own.seed)
    copy.to(first.dtype)
    num_bytes = sum(p.numel() * p.element_size() for p in copy.parameters())
    gathered = None
    try:
        if wanted:
            copy.to_empty(device=device)
        gathered = first.new_empty(max(share.numel() for share in shares.values()) * world_size, device=device)
    except torch.OutOfMemoryError:
        copy = None
    has_room = torch.tensor(float(gathered is not None), device=device)
    if int(sum_over_ranks(has_room)) < world_size or gathered is None:
        raise NoRoomError(num_bytes)
    for name, whole in copy.named_parameters():
        share = shares[name].data.to(device)
        filled = gathered[: share.numel() * world_size]
        dist.all_gather_into_tensor(filled, share)
        if wanted:
            whole.copy_(filled[: whole.numel()].view(whole.shape))
    if not wanted:
        return None
    for part in copy.modules():
        if isinstance(part, RelativeBias):
            part.reset_buckets()
    copy.pad_id, copy.eos_id = own.pad_id, own.eos_id
    return copy.eval().requires_grad_(False)
