"""Where DeepSpeed keeps a step's gradients between the last backward and the optimizer: summed over ranks, unclipped.

Like fragments.py this file alone knows it, of DeepSpeed 0.19.8 (tests/train/guard/test_bad_numbers.py probes every
place):

- stage 0: the parameters' `grad`, whole on every rank;
- bf16 at stage 1: `fp32_groups_gradients`, whole on every rank;
- stages 1 and 2: `averaged_gradients`, the parts of `params_in_partition` that this rank steps on, and padding;
- stage 3: `averaged_gradients`, this rank's partition of each of `fp16_groups`;
- stages 1-3 with the optimizer in host memory: the gradients are on their way there, and DeepSpeed has left the norm of
  each of this rank's parts on the device (`norm_for_param_grads`). The norm stands for the part: it is finite if
  the part is (it is taken in float64), and no second pass over host memory is needed.
"""

from typing import Any

import torch

from colt5dist.train.engine.engine import Engine

LARGEST = 1e12
"""A gradient with a larger element counts as not finite, too: its square could overflow in the float32 norms of some
stages, which would skip a step that others apply."""


def own_gradients(engine: Engine) -> list[tuple[int, torch.Tensor]]:
    """Key of each parameter that this rank holds a gradient of, and that gradient's part, or its norm."""
    optimizer = engine.deepspeed.optimizer
    if engine.stage == 0:
        return [(id(p), p.grad) for p in engine.module.parameters() if p.grad is not None]
    if _is_offloaded(engine):
        return list(optimizer.norm_for_param_grads.items())
    pairs: list[tuple[Any, torch.Tensor]] = []
    if hasattr(optimizer, "fp32_groups_gradients"):
        for group, parts in zip(optimizer.bf16_groups, optimizer.fp32_groups_gradients, strict=True):
            pairs += zip(group, parts, strict=True)
    elif engine.stage == 3:
        for number, group in enumerate(optimizer.fp16_groups):
            pairs += zip(group, optimizer.averaged_gradients[number], strict=True)
    else:
        for number, group in enumerate(optimizer.params_in_partition):
            parts = [part for part in optimizer.averaged_gradients[number] if not hasattr(part, "_zero_padding")]
            pairs += zip(group, parts, strict=True)
    return [(id(p), part) for p, part in pairs if part.numel()]


def _is_offloaded(engine: Engine) -> bool:
    optimizer = engine.deepspeed.optimizer
    return bool(getattr(optimizer, "cpu_offload", False) or getattr(optimizer, "offload_optimizer", False))


def _names(engine: Engine) -> dict[int, str]:
    """Name of each parameter by the key that `own_gradients` gives it."""
    key = engine.deepspeed.optimizer.get_param_id if _is_offloaded(engine) else id
    return {key(p): name for name, p in engine.module.named_parameters()}


def count_not_finite(engine: Engine) -> torch.Tensor:
    """1 if a gradient that this rank holds is not finite somewhere, else 0; (1,) float64 on the device."""
    parts = [part for _, part in own_gradients(engine)]
    # the largest magnitude, unlike a sum of squares, does not overflow, and NaN passes through it
    largest = torch.nn.utils.get_total_norm(parts, norm_type=float("inf"))
    return are_bad(largest).to(engine.device, torch.float64).reshape(1)


def names_not_finite(engine: Engine) -> list[str]:
    """Names of those parameters; reads on the host, one parameter after another."""
    names = _names(engine)
    return sorted({names[key] for key, part in own_gradients(engine) if bool(are_bad(part))})


def spoil(engine: Engine) -> None:
    """Make the engine's next step one that is skipped, whatever the gradients are: every rank puts a NaN into one.

    DeepSpeed then does all that belongs to a skipped step itself: its counters, buffers and what it keeps for offload.
    """
    for _, part in own_gradients(engine)[:1]:
        part.view(-1)[:1].fill_(float("nan"))


def are_bad(values: torch.Tensor) -> torch.Tensor:
    """Whether some of the values is NaN, infinite or larger than LARGEST; a bool scalar on their device."""
    return ~(values.abs() <= LARGEST).all()
