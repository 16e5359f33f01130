"""Gradients of ZeRO stage 3 in flat float32 tensors, summed over ranks layer by layer, during the backward pass.

    a layer's gradients are there    summed over ranks in one collective, beside the next layer's backward pass
    each sum                         added in float32 to this rank's part
    step                             norm; clipping and AdamW on the part; then `ShardedWeights` gathers anew

Shards, moments and sums stay where DeepSpeed 0.19.8 has them. What is taken from it (probed by
tests/train/engine/test_flat_gradients.py): `fp32_partitioned_groups_flat`, `fp16_partitioned_groups_flat`,
`grad_partitions_flat_buffer`, `grad_position`, `sub_group_to_group_id`,
`_reassign_or_swap_out_partitioned_parameters`, and what `ShardedWeights` uses.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from colt5dist.ops.accumulate import accumulate_
from colt5dist.train.engine.gradient_sums import GradientSums
from colt5dist.train.engine.sharded_weights import ShardedWeights, Unit, as_one_collective
from colt5dist.train.optimizer.adamw import FlatWeights, step_in_one_pass


class ShardedGradients(GradientSums):
    """Gradients of a model under ZeRO stage 3, without offload; gathers its weights, too.

    Args:
        deepspeed: the DeepSpeed engine, whose own hooks are removed.
        layers: the kinds of modules that are gathered, and whose gradients are summed over ranks, one at a time.
        clipping: largest global gradient norm; 0: no clipping.
        reduce_dtype: number format of the sum over ranks.
        one_host: whether all ranks are on one host.
    """

    def __init__(
        self,
        deepspeed: Any,
        layers: tuple[type[nn.Module], ...],
        *,
        clipping: float,
        reduce_dtype: torch.dtype,
        one_host: bool,
    ) -> None:
        super().__init__(deepspeed, clipping=clipping, reduce_dtype=reduce_dtype)
        self.one_host = one_host
        self.masters: list[torch.Tensor] = list(self.optimizer.fp32_partitioned_groups_flat)
        self.sums = list(self.optimizer.grad_partitions_flat_buffer.split([m.numel() for m in self.masters]))
        self.weights = ShardedWeights(deepspeed, layers)
        self._parts: dict[str, torch.Tensor] = {}
        self._part_of: dict[nn.Parameter, torch.Tensor] = {}
        for name, p in deepspeed.module.named_parameters():
            group, start, _ = self.optimizer.grad_position[self.optimizer.get_param_id(p)]
            size = p.ds_tensor.numel()
            part = self.sums[group][start : start + size]
            self._part_of[p] = part
            count = min(size, p.ds_numel - self.rank * size)  # the last shards may be padding
            if count > 0:
                self._parts[name] = part[:count]
            add = partial(accumulate_, part) if self.world_size == 1 else partial(self._take, p)
            self._add_hook(name, p, add)
        self._gradients: dict[nn.Parameter, torch.Tensor] = {}
        self._num_taken: dict[int, int] = {}
        self._sent: list[torch.Tensor] = []

    def _take(self, p: Any, gradient: torch.Tensor) -> None:
        """Keep a parameter's gradient until its unit has all."""
        self._gradients[p] = gradient
        unit = self.weights.unit_of[p]
        taken = self._num_taken[id(unit)] = self._num_taken.get(id(unit), 0) + 1
        if taken == len(unit.parameters):
            self._reduce(unit)

    def _reduce(self, unit: Unit) -> None:
        """Sum a unit's gradients over ranks, beside what is launched next; a missing one counts as zeros."""
        self._num_taken.pop(id(unit), None)
        gradients = []
        for p in unit.parameters:
            gradient = self._gradients.pop(p, None)
            gradient = torch.zeros_like(p).view(-1) if gradient is None else gradient
            padding = p.ds_tensor.numel() * self.world_size - gradient.numel()
            gradients.append(nn.functional.pad(gradient, (0, padding)) if padding else gradient)
        self.weights.backward_is_over(unit)
        self.weights.join()  # the sums before this one are there: now their memory may be used again
        self._sent = gradients
        with self.weights.beside():
            for p, parts in zip(unit.parameters, self._parts_to_add(gradients), strict=True):
                accumulate_(self._part_of[p], parts)

    def _parts_to_add(self, gradients: list[torch.Tensor]) -> Sequence[torch.Tensor]:
        """What is added to this rank's part of each tensor: the sum over ranks, or a row for each rank; collective.

        Within a host, 16-bit gradients travel as they are, each part to its rank, which sums them in float32: half as
        many bytes as a reduce-scatter in float32 sends, and no copies in float32. Between hosts a reduce-scatter is
        better, because it sums within a host before it sends.
        """
        sizes = [gradient.numel() // self.world_size for gradient in gradients]
        rows = [gradient.view(self.world_size, -1) for gradient in gradients]
        if self.one_host and gradients[0].element_size() == 2 and self.reduce_dtype == torch.float32:
            sent = torch.cat(rows, dim=1)
            received = torch.empty_like(sent)
            dist.all_to_all_single(received, sent)
            return received.split(sizes, dim=1)
        tensors = [gradient.to(self.reduce_dtype) for gradient in gradients]
        if dist.get_backend() != "nccl":  # gloo has no reduce-scatter
            for tensor in tensors:
                dist.all_reduce(tensor)
            return [tensor.view(self.world_size, -1)[self.rank] for tensor in tensors]
        reduced = [tensor.new_empty(size) for tensor, size in zip(tensors, sizes, strict=True)]
        with as_one_collective(tensors[0].device):
            for part, tensor in zip(reduced, tensors, strict=True):
                dist.reduce_scatter_tensor(part, tensor)
        return reduced

    def after_backward(self) -> None:
        for unit in {id(self.weights.unit_of[p]): self.weights.unit_of[p] for p in self._gradients}.values():
            self._reduce(unit)
        self.weights.join()
        self._sent = []

    def after_micro_batch(self) -> None:
        pass

    def forget_unfinished(self) -> None:
        super().forget_unfinished()
        self._gradients.clear()
        self._num_taken.clear()
        self.weights.join()
        self._sent = []
        self.weights.reset()

    def last_norms(self) -> dict[str, torch.Tensor]:
        return {name: torch.linalg.vector_norm(part) for name, part in self._parts.items()}

    def own_sums(self) -> list[torch.Tensor]:
        return self.sums

    def own_parts(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from self._parts.items()

    def _apply(self, parts: list[torch.Tensor]) -> None:
        groups = self.optimizer.optimizer.param_groups
        for number, (master, part) in enumerate(zip(self.masters, parts, strict=True)):
            master.grad = part
            groups[self.optimizer.sub_group_to_group_id[number]]["params"].append(master)
        self.optimizer.optimizer.step()
        for group in groups:  # DeepSpeed keeps them empty between steps
            group["params"] = []
        for number, master in enumerate(self.masters):
            master.grad = None
            self.optimizer._reassign_or_swap_out_partitioned_parameters(number)
        self.weights.reset()

    def _apply_in_one_pass(self, parts: list[torch.Tensor], coefficient: float, *, clear: bool) -> None:
        optimizer = self.optimizer
        flats = []
        for number, (master, part) in enumerate(zip(self.masters, parts, strict=True)):
            group = optimizer.optimizer.param_groups[optimizer.sub_group_to_group_id[number]]
            shards = optimizer.fp16_partitioned_groups_flat[number]  # the parameters' `ds_tensor` are views of it
            same = shards.data_ptr() == master.data_ptr()  # in float32
            flats.append(FlatWeights(group, master, part, None if same else shards))
        step_in_one_pass(optimizer.optimizer, flats, coefficient, clear=clear)
        self.weights.reset()
