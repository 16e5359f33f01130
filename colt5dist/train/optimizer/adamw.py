"""torch.optim.AdamW's step on flat float32 tensors, in one pass over memory.

The moments and the number of steps are where torch.optim.AdamW keeps them, and are made as it makes them. So a run may
take one step this way and the next by `torch.optim.AdamW.step`, and its checkpoints are the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from colt5dist.ops.adamw import adamw_
from colt5dist.train.optimizer.groups import ADAMW_MOMENTS


@dataclass(frozen=True)
class FlatWeights:
    """Weights of one parameter group, or of a part of it, and what a step reads and writes beside them."""

    group: dict[str, Any]
    """The optimizer's parameter group."""
    master: torch.Tensor
    """(n,) float32, what the optimizer keeps its state for."""
    gradient: torch.Tensor
    """(n,) float32."""
    copy: torch.Tensor | None
    """(n,), gets the new weights in its own number format."""


def can_step_in_one_pass(optimizer: torch.optim.Optimizer) -> bool:
    """Whether `step_in_one_pass` serves: for torch's fused AdamW without variants, as `build_optimizer` makes it."""
    return type(optimizer) is torch.optim.AdamW and all(
        group["fused"] and not (group["amsgrad"] or group["maximize"]) for group in optimizer.param_groups
    )


@torch.no_grad()
def step_in_one_pass(
    optimizer: torch.optim.Optimizer, flats: Sequence[FlatWeights], scale: float, *, clear: bool
) -> None:
    """Step the weights; reads the number of steps on the host.

    Args:
        optimizer: one for which `can_step_in_one_pass` holds; its state is used, its own `step` is not called.
        flats: all that it steps on, on one device.
        scale: what gradients are multiplied by first.
        clear: whether zeros are left in the gradients.
    """
    states = [_state(optimizer, flat.master) for flat in flats]
    counts = [state["step"] for state in states]
    torch._foreach_add_(counts, 1)
    for flat, state, step in zip(flats, states, torch.stack(counts).tolist(), strict=True):
        adamw_(
            flat.master,
            flat.gradient,
            *(state[key] for key in ADAMW_MOMENTS),
            step=step,
            lr=flat.group["lr"],
            betas=flat.group["betas"],
            eps=flat.group["eps"],
            weight_decay=flat.group["weight_decay"],
            scale=scale,
            copy=flat.copy,
            clear=clear,
        )


def _state(optimizer: torch.optim.Optimizer, master: torch.Tensor) -> dict[str, Any]:
    """The optimizer's state of a tensor; before the first step, made as torch's fused AdamW makes it."""
    state: dict[str, Any] = optimizer.state[master]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=master.device)
        for key in ADAMW_MOMENTS:
            state[key] = torch.zeros_like(master)
    return state
