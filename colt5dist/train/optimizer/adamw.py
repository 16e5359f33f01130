"""torch.optim.AdamW's step on flat float32 tensors, in one pass over memory.

The moments and the number of steps are where torch.optim.AdamW keeps them, and are made as it makes them. So a run may
take one step this way and the next by `torch.optim.AdamW.step`, and its checkpoints are the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from colt5dist.errors import first_line
from colt5dist.ops.adamw import adamw_
from colt5dist.train.optimizer.groups import ADAMW_MOMENTS

BFLOAT16_ROUNDING = 2**-8
"""Relative; Triton's interpreter cuts numbers off where a GPU rounds them."""


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


def problem_of_one_pass(device: torch.device) -> str | None:
    """Take three steps on a GPU with the kernel and with plain PyTorch; returns what fails or differs, if anything."""
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(10_000, generator=generator, dtype=torch.float32) for _ in range(4)]
    results = []
    try:
        for implementation in ("triton", "reference"):
            weights, exp_avg, exp_avg_sq, gradient = (x.to(device, copy=True) for x in start)
            exp_avg_sq.square_()
            copy = torch.empty_like(weights, dtype=torch.bfloat16)
            for step in (1, 2, 3):
                gradient.copy_(start[3])
                adamw_(
                    weights,
                    gradient,
                    exp_avg,
                    exp_avg_sq,
                    step=step,
                    lr=1e-2,
                    betas=(0.9, 0.95),
                    eps=1e-8,
                    weight_decay=0.1,
                    scale=0.5,
                    copy=copy,
                    clear=True,
                    implementation=implementation,
                )
            results.append((weights, exp_avg, exp_avg_sq, gradient, copy.float()))
        for name, got, expected in zip(("weights", "exp_avg", "exp_avg_sq", "gradient", "copy"), *results, strict=True):
            error = float((got - expected).norm())
            if not error <= (BFLOAT16_ROUNDING if name == "copy" else 1e-5) * float(expected.norm()):
                return f"{name} differ by {error:g}"
    except Exception as error:  # whatever a compiler may raise
        return first_line(error)
    return None


@torch.no_grad()
def step_in_one_pass(
    optimizer: torch.optim.Optimizer, flats: Sequence[FlatWeights], scale: float, *, clear: bool
) -> None:
    """Step the weights.

    Args:
        optimizer: one for which `can_step_in_one_pass` holds; its state is used, its own `step` is not called.
        flats: all that it steps on, on one device.
        scale: what gradients are multiplied by first.
        clear: whether zeros are left in the gradients.
    """
    states = [_state(optimizer, flat.master) for flat in flats]
    for flat, state, step in zip(flats, states, _count(optimizer, [state["step"] for state in states]), strict=True):
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


def _count(optimizer: torch.optim.Optimizer, counts: list[torch.Tensor]) -> list[float]:
    """Add 1 to the numbers of steps, and return them; the host waits for the GPU only if others have changed them."""
    known: dict[torch.Tensor, tuple[int, float]] = vars(optimizer).setdefault("_known_steps", {})
    if any(count not in known or known[count][0] != count._version for count in counts):
        known.clear()
        for count, number in zip(counts, torch.stack(counts).tolist(), strict=True):
            known[count] = (count._version, number)
    torch._foreach_add_(counts, 1)
    for count in counts:
        known[count] = (count._version, known[count][1] + 1)
    return [known[count][1] for count in counts]


def _state(optimizer: torch.optim.Optimizer, master: torch.Tensor) -> dict[str, Any]:
    """The optimizer's state of a tensor; before the first step, made as torch's fused AdamW makes it."""
    state: dict[str, Any] = optimizer.state[master]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=master.device)
        for key in ADAMW_MOMENTS:
            state[key] = torch.zeros_like(master)
    return state
