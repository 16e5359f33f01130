"""A copy of a model with whole weights, for ZeRO stage 3, where each rank has but a share of every weight."""

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from colt5dist.errors import ConfigError
from colt5dist.nn.attention.relative_bias import RelativeBias
from colt5dist.train.ranks import sum_over_ranks

SPARE_BYTES = 1 << 30
"""Memory of a GPU that a copy has to leave to CUDA's libraries and NCCL, which would end a run for want of it."""


class NoRoomError(ConfigError):
    """Some rank has no room for what a copy with whole weights takes there; raised on all ranks.

    Args:
        num_bytes: the memory of whole weights.
    """

    known_to_all = True

    def __init__(self, num_bytes: int) -> None:
        super().__init__(
            f"at zero.stage=3 whole weights, with which texts are written, take {num_bytes / 2**30:.2g} GiB more, and "
            "a GPU has no room for them; lower train.micro_batch_size, or have no texts written "
            "(train.eval_generate_samples=0, monitor.held_out_sample=false)"
        )


@torch.no_grad()
def whole_copy(
    module: nn.Module, device: torch.device, has_room: torch.Tensor, *, wanted: bool = True
) -> nn.Module | None:
    """Return a copy of a model under ZeRO stage 3 that any rank can use without the others; collective.

    It takes the memory of all weights in their own number format, where it is wanted; on every rank, until it is
    complete, that of the largest weight. What is taken from DeepSpeed 0.19.8: `ds_tensor`, a parameter's share, which
    may end in padding, and may be in host memory.

    Args:
        module: the model, `CoLT5` or `CausalCoLT5`.
        device: where to put the copy.
        has_room: (1,) on the device, by which the ranks agree; allocated earlier, since by now there may be no memory.
        wanted: whether this rank wants one; the others help it to theirs.

    Returns:
        The copy, in evaluation mode, without gradients; None where it is not wanted.

    Raises:
        NoRoomError: on all ranks, if some rank has no room.
    """
    own: Any = module
    shares: dict[str, torch.Tensor] = {name: p.ds_tensor.data for name, p in own.named_parameters()}
    some = next(iter(shares.values()))
    with torch.device("meta"):
        copy: Any = type(own)(replace(own.config), seed=own.seed)
    copy.to(some.dtype)
    num_bytes = sum(p.numel() * p.element_size() for p in copy.parameters())
    # whatever takes memory comes before the ranks agree, so that no rank leaves the others in a collective
    has_room.fill_(1)
    buffers = None
    try:
        if wanted:
            copy.to_empty(device=device)
        buffers = allocate_buffers(list(shares.values()), device)
    except torch.OutOfMemoryError:
        has_room.zero_()
    if int(sum_over_ranks(has_room)) < dist.get_world_size() or buffers is None:
        copy = buffers = None  # the error keeps what this frame refers to
        raise NoRoomError(num_bytes)
    share_buffer, whole_buffer = buffers
    for name, whole in copy.named_parameters():
        size = shares[name].numel()
        share = shares[name] if share_buffer is None else share_buffer[:size].copy_(shares[name])
        gathered = whole_buffer[: size * dist.get_world_size()]
        dist.all_gather_into_tensor(gathered, share)
        if wanted:
            whole.copy_(gathered[: whole.numel()].view(whole.shape))
    if not wanted:
        return None
    for part in copy.modules():
        if isinstance(part, RelativeBias):
            part.reset_buckets()
    copy.pad_id, copy.eos_id = own.pad_id, own.eos_id
    return copy.eval().requires_grad_(False)


def allocate_buffers(shares: list[torch.Tensor], device: torch.device) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Allocate a buffer for a share, if shares are not on the device, and one for a whole weight.

    Args:
        shares: this rank's share of each weight.
        device: where weights are gathered.

    Raises:
        torch.OutOfMemoryError: there is no room, or too little would be left.
    """
    size = max(share.numel() for share in shares)
    is_there = shares[0].device.type == device.type
    share_buffer = None if is_there else shares[0].new_empty(size, device=device)
    whole_buffer = shares[0].new_empty(size * dist.get_world_size(), device=device)
    if device.type == "cuda" and torch.cuda.mem_get_info(device)[0] < SPARE_BYTES:
        raise torch.OutOfMemoryError(f"less than {SPARE_BYTES} bytes of the GPU are left")
    return share_buffer, whole_buffer
