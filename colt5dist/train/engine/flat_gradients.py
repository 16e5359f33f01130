"""Gradients of ZeRO stages 1 and 2 in flat float32 tensors, summed by us instead of by DeepSpeed's hooks.

DeepSpeed runs Python for every parameter of every micro-batch. That cannot be captured in a CUDA graph, and keeps a
fast GPU waiting. Here a hook per parameter adds its gradient to its place in one flat tensor, which a graph can hold;
what remains per step are a few operators on flat tensors:

    each micro-batch    gradient of a parameter -> added in float32 (stage 2 on several ranks: kept, then reduced)
    after the last      sum over ranks, each rank keeping its own partition (reduce-scatter)
    step                norm; clipping and AdamW on the partition; the new weights gathered

Weights, moments and partitions stay where DeepSpeed 0.19.8 has them, so that checkpoints do not change. What is taken
from it is in `_layouts` alone (tests/train/engine/test_flat_gradients.py probes it): stages 1 and 2
`bit16_groups_flat`, `single_partition_of_fp32_groups`; bf16 at stage 1 `bf16_groups_flat`,
`fp32_groups_flat_partition`, `fp32_groups_gradients_flat`; both `_grad_acc_hooks` and `update_lp_params`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from colt5dist.ops.accumulate import accumulate_
from colt5dist.train.engine.gradient_sums import GradientSums
from colt5dist.train.optimizer.adamw import FlatWeights, step_in_one_pass


@dataclass(frozen=True)
class Layout:
    """One parameter group as DeepSpeed lays it out."""

    weights: torch.Tensor
    """(elements,), the weights that forward uses, padded to a multiple of the ranks; parameters are views of it."""
    master: torch.Tensor
    """(elements / ranks,) float32, this rank's partition of the weights that the optimizer steps on."""
    sums: torch.Tensor | None
    """(elements,) float32, a gradient buffer that DeepSpeed has made already; None where there is none."""


def _layouts(optimizer: Any) -> list[Layout]:
    """The parameter groups of a ZeRO optimizer of stage 1 or 2."""
    if hasattr(optimizer, "single_partition_of_fp32_groups"):
        pairs = zip(optimizer.bit16_groups_flat, optimizer.single_partition_of_fp32_groups, strict=True)
        return [Layout(weights, master, None) for weights, master in pairs]
    triples = zip(
        optimizer.bf16_groups_flat,
        optimizer.fp32_groups_flat_partition,
        optimizer.fp32_groups_gradients_flat,
        strict=True,
    )
    return [Layout(*triple) for triple in triples]


class FlatGradients(GradientSums):
    """Gradients of a model under ZeRO stage 1 or 2.

    Args:
        deepspeed: the DeepSpeed engine, whose own gradient hooks are removed.
        stage: 1 or 2.
        clipping: largest global gradient norm; 0: no clipping.
        reduce_dtype: number format of the sum over ranks.
        bucket_size: elements that are summed over ranks at once.
    """

    def __init__(
        self, deepspeed: Any, stage: int, *, clipping: float, reduce_dtype: torch.dtype, bucket_size: int
    ) -> None:
        super().__init__(deepspeed, clipping=clipping, reduce_dtype=reduce_dtype)
        self.bucket_size = bucket_size
        self.layouts = _layouts(self.optimizer)
        # stage 2 keeps the sums of this rank's partition only, and the whole gradient of one micro-batch at a time
        self.sums_whole = stage == 1 or self.world_size == 1
        self.sums = []
        self.incoming: list[torch.Tensor] = []
        for layout in self.layouts:
            if self.sums_whole:
                whole = layout.sums
                self.sums.append(torch.zeros_like(layout.weights, dtype=torch.float32) if whole is None else whole)
            else:
                self.sums.append(torch.zeros_like(layout.master))
                self.incoming.append(torch.zeros_like(layout.weights))
        self._places: dict[str, tuple[int, int, int]] = {}
        for name, p in deepspeed.module.named_parameters():
            group, offset, count = self._places[name] = self._place(p)
            target = (self.sums if self.sums_whole else self.incoming)[group][offset : offset + count]
            self._add_hook(name, p, partial(accumulate_, target) if self.sums_whole else partial(_copy, target))
        self._reduced = False

    def _place(self, p: nn.Parameter) -> tuple[int, int, int]:
        """Group of a parameter, and its first element and number of elements in the group's flat tensor."""
        starts = [(p.data_ptr() - layout.weights.data_ptr()) // p.element_size() for layout in self.layouts]
        sizes = [layout.weights.numel() for layout in self.layouts]
        group = next(i for i, (start, size) in enumerate(zip(starts, sizes, strict=True)) if 0 <= start < size)
        return group, starts[group], p.numel()

    def last_norms(self) -> dict[str, torch.Tensor]:
        whole = self.sums if self.sums_whole else self.incoming
        return {
            name: torch.linalg.vector_norm(whole[group][offset : offset + count])
            for name, (group, offset, count) in self._places.items()
        }

    def clear(self, *, sums_are_zero: bool = False) -> None:
        super().clear(sums_are_zero=sums_are_zero)
        for whole in self.incoming:
            whole.zero_()
        self._reduced = False

    def after_backward(self) -> None:
        pass

    def after_micro_batch(self) -> None:
        """Stage 2 on several ranks: add the micro-batch's gradient, summed over ranks, to this rank's partition."""
        if not self.sums_whole:
            for total, whole in zip(self.sums, self.incoming, strict=True):
                for piece, reduced in self._reduced_pieces(whole):
                    total[piece] += reduced
                    del reduced  # or its memory stays while that of the next tensor is taken

    def own_sums(self) -> list[torch.Tensor]:
        if not self.sums_whole or self.world_size == 1:
            return self.sums
        parts = [whole.chunk(self.world_size)[self.rank] for whole in self.sums]
        if not self._reduced:
            self._reduced = True
            for part, whole in zip(parts, self.sums, strict=True):
                for piece, reduced in self._reduced_pieces(whole):
                    part[piece] = reduced
                    del reduced  # or its memory stays while that of the next tensor is taken
        return parts

    def _reduced_pieces(self, whole: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
        """Sum a flat tensor over ranks, piece by piece, which bounds the memory that the sums take.

        Yields:
            A piece of this rank's partition, and its sum over ranks in `reduce_dtype`; the next sum replaces it.
        """
        rows = whole.view(self.world_size, -1)
        size = min(max(1, self.bucket_size // self.world_size), rows.shape[1])
        is_nccl = dist.get_backend() == "nccl"  # gloo has no reduce-scatter in all versions of PyTorch
        # taken once: if each piece had memory of its own, that of the piece before would still be there
        outgoing = whole.new_empty(self.world_size * size, dtype=self.reduce_dtype)
        incoming = whole.new_empty(size if is_nccl else 0, dtype=self.reduce_dtype)
        for first in range(0, rows.shape[1], max(1, size)):
            piece = slice(first, min(first + size, rows.shape[1]))
            count = piece.stop - piece.start
            sent = outgoing[: self.world_size * count].view(self.world_size, count)
            sent.copy_(rows[:, piece])
            if is_nccl:
                reduced = incoming[:count]
                dist.reduce_scatter_tensor(reduced, sent)
            else:
                dist.all_reduce(sent)
                reduced = sent[self.rank]
            yield piece, reduced

    def own_parts(self) -> Iterator[tuple[str, torch.Tensor]]:
        parts = self.own_sums()
        for name, (group, offset, count) in self._places.items():
            size = parts[group].numel()
            first = max(offset - self.rank * size, 0)
            last = min(offset + count - self.rank * size, size)
            if first < last:
                yield name, parts[group][first:last]

    def _apply(self, parts: list[torch.Tensor]) -> None:
        for layout, part in zip(self.layouts, parts, strict=True):
            layout.master.grad = part
        self.optimizer.optimizer.step()
        for layout in self.layouts:
            layout.master.grad = None
        self.optimizer.update_lp_params()

    def _apply_in_one_pass(self, parts: list[torch.Tensor], coefficient: float, *, clear: bool) -> None:
        alone = self.world_size == 1
        groups = self.optimizer.optimizer.param_groups
        flats = [
            FlatWeights(group, layout.master, part, layout.weights if alone else None)
            for group, layout, part in zip(groups, self.layouts, parts, strict=True)
        ]
        step_in_one_pass(self.optimizer.optimizer, flats, coefficient, clear=clear)
        if not alone:
            self.optimizer.update_lp_params()  # copies this rank's partition, and gathers the others'


def _copy(target: torch.Tensor, gradient: torch.Tensor) -> None:
    target.copy_(gradient)
