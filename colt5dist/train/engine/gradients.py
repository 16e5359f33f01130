"""A step's gradients where DeepSpeed sums them itself: stage 0, offloaded optimizers, and CPUs.

`GradientSums` do the same for ZeRO stages 1 to 3 on GPUs, without DeepSpeed's Python per parameter, and have the same
methods.
Between the last backward pass and the optimizer, summed over ranks and unclipped, DeepSpeed 0.19.8 keeps the gradients
here (tests/train/guard/test_bad_numbers.py probes every place):

- stage 0: the parameters' `grad`, whole on every rank;
- bf16 at stage 1: `fp32_groups_gradients`, whole on every rank;
- stages 1 and 2: `averaged_gradients`, the parts of `params_in_partition` that this rank steps on, and padding;
- stage 3: `averaged_gradients`, this rank's partition of each of `fp16_groups`;
- stages 1-3 with the optimizer in host memory: the gradients are on their way there, and DeepSpeed has left the norm of
  each of this rank's parts on the device (`norm_for_param_grads`). The norm stands for the part: it is finite if
  the part is (it is taken in float64), and no second pass over host memory is needed.
"""

from collections.abc import Sequence
from typing import Any

import torch

LARGEST = 1e12
"""A gradient with a larger element counts as not finite, too: its square could overflow in the float32 norms of some
stages, which would skip a step that others apply."""


class DeepSpeedGradients:
    """Sums, judges and applies gradients through DeepSpeed's own hooks and its `step`.

    Args:
        deepspeed: the DeepSpeed engine.
        stage: its ZeRO stage.
        clipping: largest global gradient norm, for stage 0, where DeepSpeed does not clip; 0: no clipping.
        device: device of this rank.
    """

    def __init__(self, deepspeed: Any, stage: int, *, clipping: float, device: torch.device) -> None:
        self.deepspeed, self.stage, self.clipping, self.device = deepspeed, stage, clipping, device
        self._begun = False

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradient of this rank's share of the global loss.

        The gradients of all micro-batches and ranks are summed: DeepSpeed's division by the accumulation steps is
        switched off and its mean over ranks undone.
        """
        if self._begun:
            self.deepspeed.step()  # not at the boundary yet: only counts the micro-batch that came before
        self.deepspeed.backward(loss * self.deepspeed.world_size, scale_wrt_gas=False)
        self._begun = True

    def summary(self) -> torch.Tensor:
        """1 if a gradient that this rank holds is not finite somewhere, else 0; (1,) float64 on the device."""
        parts = [part for _, part in self._own_parts()]
        # the largest magnitude, unlike a sum of squares, does not overflow, and NaN passes through it
        largest = torch.nn.utils.get_total_norm(parts, norm_type=float("inf"))
        return are_bad(largest).to(self.device, torch.float64).reshape(1)

    def are_finite(self, summary: Sequence[float]) -> bool:
        """Whether all gradients are finite, by the sum of all ranks' summaries (1,)."""
        return summary[0] == 0

    def names_not_finite(self) -> list[str]:
        """Names of the parameters whose gradient is not finite in this rank's part; reads on the host."""
        key = self.deepspeed.optimizer.get_param_id if self._is_offloaded else id
        names = {key(p): name for name, p in self.deepspeed.module.named_parameters()}
        return sorted({names[place] for place, part in self._own_parts() if bool(are_bad(part))})

    def refuse(self) -> None:
        """Have the next step change nothing, whatever the gradients are: every rank puts a NaN into one.

        DeepSpeed then does all that belongs to a skipped step itself: its counters, buffers and what it keeps for
        offload.
        """
        for _, part in self._own_parts()[:1]:
            part.view(-1)[:1].fill_(float("nan"))

    def step(self) -> tuple[bool, float]:
        """Clip and apply the gradients, or drop them if they are not finite.

        Returns:
            Whether the step was applied, and the global gradient norm before clipping.
        """
        self._begun = False
        finite, norm = self._clip_whole_gradients() if self.stage == 0 else (True, 0.0)
        self.deepspeed.step()
        if self.stage:
            norm = float(self.deepspeed.get_global_grad_norm())
            finite = self.deepspeed.was_step_applied()
        if not finite:
            self._drop_sums()
        return finite, norm

    @property
    def _is_offloaded(self) -> bool:
        optimizer = self.deepspeed.optimizer
        return bool(getattr(optimizer, "cpu_offload", False) or getattr(optimizer, "offload_optimizer", False))

    def _own_parts(self) -> list[tuple[int, torch.Tensor]]:
        """Key of each parameter that this rank holds a gradient of, and that gradient's part, or its norm."""
        optimizer = self.deepspeed.optimizer
        if self.stage == 0:
            return [(id(p), p.grad) for p in self.deepspeed.module.parameters() if p.grad is not None]
        if self._is_offloaded:
            return list(optimizer.norm_for_param_grads.items())
        pairs: list[tuple[Any, torch.Tensor]] = []
        if hasattr(optimizer, "fp32_groups_gradients"):
            for group, parts in zip(optimizer.bf16_groups, optimizer.fp32_groups_gradients, strict=True):
                pairs += zip(group, parts, strict=True)
        elif self.stage == 3:
            for number, group in enumerate(optimizer.fp16_groups):
                pairs += zip(group, optimizer.averaged_gradients[number], strict=True)
        else:
            for number, group in enumerate(optimizer.params_in_partition):
                parts = [part for part in optimizer.averaged_gradients[number] if not hasattr(part, "_zero_padding")]
                # the padding at the end of the last rank's partition is not always marked
                pairs += zip(group, parts[: len(group)], strict=True)
        return [(id(p), part) for p, part in pairs if part.numel()]

    def _drop_sums(self) -> None:
        """Forget the gradients of a skipped step.

        DeepSpeed 0.19.8 does so itself, but for offloaded optimizers at stages 1 and 2: there the sums, and with them
        what is not finite, would go on into every later step.
        """
        for name in ("averaged_gradients", "all_grad_tensors"):
            sums = getattr(self.deepspeed.optimizer, name, {})
            for group in sums:
                sums[group] = None

    def _clip_whole_gradients(self) -> tuple[bool, float]:
        """Stage 0, where every rank holds the whole gradients: drop those that are not finite, which skips the step."""
        parameters = [p for p in self.deepspeed.module.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        value = float(norm)
        finite = value < float("inf")
        if not finite:
            for p in parameters:
                p.grad = None
        elif self.clipping > 0:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.clipping, norm)
        return finite, value


def are_bad(values: torch.Tensor) -> torch.Tensor:
    """Whether some of the values is NaN, infinite or larger than LARGEST; a bool scalar on their device."""
    return ~(values.abs() <= LARGEST).all()
