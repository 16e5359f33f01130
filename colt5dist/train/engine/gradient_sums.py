"""What the engine asks of a step's gradients wherever we sum them ourselves, in flat float32 tensors.

`FlatGradients` does it for ZeRO stages 1 and 2, `ShardedGradients` for stage 3. With both the optimizer steps on flat
partitions of the float32 weights, and this rank's sums of gradients have the same layout.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from colt5dist.ops.implementation import HAS_TRITON
from colt5dist.train.engine.gradients import LARGEST, are_bad
from colt5dist.train.optimizer.adamw import can_step_in_one_pass, problem_of_one_pass
from colt5dist.train.ranks import sum_over_ranks


class GradientSums(ABC):
    """Sums, reduces, judges and applies the gradients of a model.

    Args:
        deepspeed: the DeepSpeed engine, whose own gradient hooks are removed.
        clipping: largest global gradient norm; 0: no clipping.
        reduce_dtype: number format of the sum over ranks.
    """

    sums: list[torch.Tensor]
    """One a group of parameters, float32: what gradients are added to."""
    one_pass: bool
    """Whether clipping, AdamW, the weights' 16-bit copy and zeroing the sums are one pass over memory: on GPUs."""

    def __init__(self, deepspeed: Any, *, clipping: float, reduce_dtype: torch.dtype) -> None:
        self.optimizer = deepspeed.optimizer
        self.clipping = clipping
        self.reduce_dtype = reduce_dtype
        self.world_size, self.rank = deepspeed.world_size, deepspeed.global_rank
        self._parameters: list[nn.Parameter] = list(deepspeed.module.parameters())
        device = self._parameters[0].device
        self.one_pass = device.type == "cuda" and HAS_TRITON and can_step_in_one_pass(self.optimizer.optimizer)
        self.note: str | None = None
        """A line for the log, where AdamW's fast way fails here."""
        if self.one_pass and (problem := problem_of_one_pass(device)):
            self.one_pass = False
            self.note = f"note: AdamW steps in several passes over memory, slower ({problem})"
        self._refused = False
        self._dropped: dict[str, torch.Tensor] | None = None
        self._norm: float | None = None
        for hook in self.optimizer._grad_acc_hooks:
            hook.remove()
        self.optimizer._grad_acc_hooks.clear()

    def _add_hook(self, name: str, p: nn.Parameter, add: Callable[[torch.Tensor], None]) -> None:
        """Have a parameter's gradient, flat, given to `add` as soon as autograd has it."""

        def take(parameter: torch.Tensor) -> None:
            assert parameter.grad is not None
            gradient = parameter.grad.view(-1)
            if self._dropped is not None:
                self._dropped[name] = torch.linalg.vector_norm(gradient, dtype=torch.float32)
                gradient = torch.zeros_like(gradient)
            add(gradient)
            parameter.grad = None

        p.register_post_accumulate_grad_hook(take)

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradient of this rank's share of the global loss."""
        loss.backward()
        self.after_backward()
        self.after_micro_batch()

    @contextmanager
    def dropped(self) -> Iterator[dict[str, torch.Tensor]]:
        """Within it zeros are added in place of gradients, by the same kernels; gives the norms of the gradients."""
        norms: dict[str, torch.Tensor] = {}
        self._dropped = norms
        try:
            yield norms
        finally:
            self._dropped = None
            self.forget_unfinished()

    def forget_unfinished(self) -> None:
        """Forget what a backward pass that failed has left at the parameters, which the next would add to."""
        for p in self._parameters:
            p.grad = None

    @abstractmethod
    def last_norms(self) -> dict[str, torch.Tensor]:
        """Norm of each parameter's gradient after the first micro-batch of a step, as far as this rank has it."""

    def clear(self, *, sums_are_zero: bool = False) -> None:
        """Forget the gradients; `sums_are_zero`: the sums need no zeros any more."""
        if not sums_are_zero:
            for total in self.sums:
                total.zero_()

    @abstractmethod
    def after_backward(self) -> None:
        """What belongs to the end of a backward pass; it is in the pass's CUDA graph, if there is one."""

    @abstractmethod
    def after_micro_batch(self) -> None:
        """What is left to do after that, outside of the graph."""

    @abstractmethod
    def own_sums(self) -> list[torch.Tensor]:
        """The summed gradient of this rank's partition of each group, float32; reduced over ranks when first asked."""

    @abstractmethod
    def own_parts(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Name of each parameter that this rank's partition holds a part of, and that part of its summed gradient."""

    def summary(self) -> torch.Tensor:
        """This rank's part of the squared global norm; (1,) float64 on the device, to be added over ranks.

        Collective when it is the first to need a step's sums over ranks.
        """
        norms = torch.stack([torch.linalg.vector_norm(part) for part in self.own_sums()])
        return norms.double().square().sum().reshape(1)

    def are_finite(self, summary: Sequence[float]) -> bool:
        """Whether all gradients are finite, by the sum of all ranks' summaries (1,); `step` then knows their norm."""
        self._norm = summary[0] ** 0.5
        return self._norm <= LARGEST

    def names_not_finite(self) -> list[str]:
        """Names of the parameters whose gradient is not finite in this rank's part; reads on the host."""
        return sorted(name for name, part in self.own_parts() if bool(are_bad(part)))

    def refuse(self) -> None:
        """Have the next step change nothing."""
        self._refused = True

    @torch.no_grad()
    def step(self) -> tuple[bool, float]:
        """Clip and apply the gradients, unless they were refused or are not finite; the sums begin anew.

        Returns:
            Whether the step was applied, and the global gradient norm before clipping.
        """
        norm = self._norm
        if norm is None:
            norm = float(sum_over_ranks(self.summary())) ** 0.5
        applied = not self._refused and norm <= LARGEST
        sums_are_zero = False
        if applied:
            coefficient = min(self.clipping / (norm + 1e-6), 1.0) if self.clipping > 0 else 1.0
            parts = self.own_sums()
            if self.one_pass:
                sums_are_zero = parts is self.sums  # else they are parts of the sums
                self._apply_in_one_pass(parts, coefficient, clear=sums_are_zero)
            else:
                if coefficient < 1:
                    torch._foreach_mul_(parts, coefficient)
                self._apply(parts)
        self.clear(sums_are_zero=sums_are_zero)
        self._refused = False
        self._norm = None
        return applied, norm

    @abstractmethod
    def _apply(self, parts: list[torch.Tensor]) -> None:
        """Step the optimizer on this rank's partitions, given their gradients; the new weights go to all ranks."""

    @abstractmethod
    def _apply_in_one_pass(self, parts: list[torch.Tensor], coefficient: float, *, clear: bool) -> None:
        """The same by `step_in_one_pass`, which scales the gradients by `coefficient` and, if asked, clears them."""
