"""Weights of ZeRO stage 3: gathered from all ranks for one layer at a time, and released after it.

DeepSpeed runs Python hooks for every module and every parameter of every pass, which keeps a fast GPU waiting, and
which no compiler sees through. Here a layer is gathered as a whole, by one collective, while the layer before it
computes; and its gradients are summed over ranks by one collective, while the next one computes:

    forward     gather layer i + 1 (communication stream) | layer i computes | release layer i
    backward    gather layer i - 1, sum gradients of layer i + 1 | layer i computes | release layer i

What belongs to no layer (embeddings, last norms, output map) is gathered for the whole pass. The last layers, with
which the backward pass begins, stay gathered as far as DeepSpeed's `stage3_max_live_parameters` allows (1e9 elements
if it is not given: a small model is gathered once a micro-batch). On one rank nothing is gathered: the parameters are
views of their only shard. Where DeepSpeed 0.19.8 keeps the shards is left as it is, so that checkpoints do not change.
What is taken from it (tests/train/engine/test_flat_gradients.py probes it): `ds_tensor`, `ds_shape`, `ds_numel` of a
parameter, `_config.zero_config`, `parameter_offload._remove_module_hooks`, `module_forward_pre_hook`,
`module_forward_post_hook`, `persistent_parameters`, `ipg_buckets`, and that it replaces the modules' `_parameters`.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn


class Unit:
    """Parameters that are gathered, used and released together.

    Args:
        parameters: those of a layer, or those outside of the layers.
        world_size: number of ranks.
    """

    def __init__(self, parameters: Sequence[Any], world_size: int) -> None:
        self.parameters = parameters
        sizes = [p.ds_tensor.numel() * world_size for p in parameters]
        first = parameters[0].ds_tensor
        self._whole = torch.empty(sum(sizes), dtype=first.dtype, device=first.device)
        self._gathered = self._whole.split(sizes)
        """What is gathered of each parameter; it may end in padding."""
        for p, gathered in zip(parameters, self._gathered, strict=True):
            p.data = gathered[: p.ds_numel].view(p.ds_shape)
        self.has_arrived: torch.cuda.Event | None = None
        """On a GPU: passed when what was begun is complete."""
        self.in_backward = False
        self.stays = False
        """Whether it stays gathered from its forward pass to its backward pass."""
        self.release()

    @property
    def num_elements(self) -> int:
        """Elements that it holds when it is gathered."""
        return self._whole.numel()

    def release(self) -> None:
        """Give the memory back; tensors that autograd keeps see the values again once the unit is gathered again."""
        self._whole.untyped_storage().resize_(0)

    @property
    def is_gathered(self) -> bool:
        """Whether the parameters hold their values, or will."""
        return self._whole.untyped_storage().size() > 0

    def gather(self) -> None:
        """Gather the parameters from all ranks; collective."""
        self._whole.untyped_storage().resize_(self._whole.numel() * self._whole.element_size())
        with as_one_collective(self._whole.device):
            for p, gathered in zip(self.parameters, self._gathered, strict=True):
                dist.all_gather_into_tensor(gathered, p.ds_tensor.data)


def as_one_collective(device: torch.device) -> AbstractContextManager[Any]:
    """Launch what is gathered, or summed over ranks, within it as one kernel where the backend can."""
    return dist._coalescing_manager(device=device) if dist.get_backend() == "nccl" else nullcontext()  # type: ignore


class ShardedWeights:
    """Gathers and releases the weights of a model under ZeRO stage 3, in place of DeepSpeed's hooks.

    Args:
        deepspeed: the DeepSpeed engine, whose own hooks are removed.
        layers: the kinds of modules that are gathered one at a time.
    """

    def __init__(self, deepspeed: Any, layers: tuple[type[nn.Module], ...]) -> None:
        self.world_size = deepspeed.world_size
        model = deepspeed.module
        _remove_hooks(deepspeed)
        self.units: list[Unit] = []
        """The layers, in the order in which they run."""
        self.unit_of: dict[nn.Parameter, Unit] = {}
        on_gpu = next(model.parameters()).device.type == "cuda"
        # none for one rank, where nothing would ever be launched in it: a CUDA graph cannot wait for a stream outside
        self._stream = torch.cuda.Stream() if on_gpu and self.world_size > 1 else None
        if self.world_size == 1:
            for p in model.parameters():
                p.data = p.ds_tensor.data[: p.ds_numel].view(p.ds_shape)
            return
        for layer in model.modules():
            if isinstance(layer, layers):
                unit = self._unit(list(layer.parameters()))
                self._add_hooks(layer, unit, len(self.units))
                self.units.append(unit)
        self.root = self._unit([p for p in model.parameters() if p not in self.unit_of])
        left = deepspeed._config.zero_config.max_live_parameters - self.root.num_elements
        for unit in reversed(self.units):
            left -= unit.num_elements
            # the backward pass begins with the last layer, so releasing that one is of no use
            unit.stays = unit is self.units[-1] or left >= 0
        model.register_forward_pre_hook(lambda *_: self._gather(self.root))
        model.register_forward_hook(self._after_model)

    def _unit(self, parameters: list[nn.Parameter]) -> Unit:
        unit = Unit(parameters, self.world_size)
        self.unit_of |= dict.fromkeys(parameters, unit)
        return unit

    def _add_hooks(self, layer: nn.Module, unit: Unit, number: int) -> None:
        """Have a layer gathered before its forward and its backward, and released after its forward."""

        def gather_with_next(step: int) -> None:
            self._gather(unit)
            if 0 <= number + step < len(self.units):
                self._begin(self.units[number + step])

        def before_backward(_: torch.Tensor) -> None:
            unit.in_backward = True
            gather_with_next(-1)

        def before_forward(*_: Any) -> None:
            gather_with_next(-1 if unit.in_backward else 1)  # activation checkpointing runs it again in backward

        def after_forward(_: nn.Module, __: Any, output: Any) -> None:
            states = output[0] if isinstance(output, tuple) else output
            if unit.in_backward:
                return
            if states.requires_grad:
                states.register_hook(before_backward)
                if unit.stays:
                    return
            unit.release()

        layer.register_forward_pre_hook(before_forward)
        layer.register_forward_hook(after_forward)

    def _after_model(self, *_: Any) -> None:
        """Release what is outside the layers, unless the backward pass needs it."""
        if not torch.is_grad_enabled():
            self.root.release()

    def _begin(self, unit: Unit) -> None:
        """Begin to gather a unit, beside what the GPU computes."""
        if unit.is_gathered:
            return
        with self.beside():
            unit.gather()
            unit.has_arrived = torch.cuda.current_stream().record_event() if self._stream else None

    def _gather(self, unit: Unit) -> None:
        """Have a unit's weights in place for what is launched next."""
        self._begin(unit)
        if unit.has_arrived is not None:
            torch.cuda.current_stream().wait_event(unit.has_arrived)
            unit.has_arrived = None

    @contextmanager
    def beside(self) -> Iterator[None]:
        """Launch work that may run beside what is launched later, after what was launched before.

        Memory that is taken within it and given back outside of it is safe: its next use comes after this wait.
        """
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield

    def join(self) -> None:
        """Have what is launched next wait for all that was launched `beside`."""
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)

    def backward_is_over(self, unit: Unit) -> None:
        """Release a unit whose gradients are all there."""
        unit.in_backward = False
        unit.has_arrived = None
        unit.release()

    def reset(self) -> None:
        """Release everything, after a pass that failed, or because the weights have changed."""
        if self.world_size > 1:
            for unit in (*self.units, self.root):
                self.backward_is_over(unit)


def _remove_hooks(deepspeed: Any) -> None:
    """Take DeepSpeed out of the model's passes, and give back the memory that only its own hooks use."""
    optimizer = deepspeed.optimizer
    optimizer.parameter_offload._remove_module_hooks()
    deepspeed.module_forward_pre_hook.remove()
    deepspeed.module_forward_post_hook.remove()
    optimizer.persistent_parameters = []
    for bucket in optimizer.ipg_buckets.values():
        bucket.buffer = None
    for module in deepspeed.module.modules():
        module._parameters = dict(module._parameters)  # DeepSpeed's own kind of dictionary gathers when it is read
