"""The DeepSpeed engine: model, optimizer and ZeRO behind the four calls that the loop makes."""

import gc
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn
from torch.profiler import record_function

from colt5dist.data.read.batch import Batch
from colt5dist.model.causal_colt5 import CausalCoLT5
from colt5dist.model.colt5 import CoLT5, CoLT5Output
from colt5dist.train.config.schema import RunConfig
from colt5dist.train.engine.compile import LAYERS, use_cache
from colt5dist.train.engine.deepspeed_json import (
    deepspeed_config,
    engine_stage,
    library_problems,
    sums_flat,
    uses_bf16,
)
from colt5dist.train.engine.flat_gradients import FlatGradients
from colt5dist.train.engine.fragments import flat_weights, place_matrices, refresh_parameters
from colt5dist.train.engine.gradient_sums import GradientSums
from colt5dist.train.engine.gradients import DeepSpeedGradients
from colt5dist.train.engine.micro_batch_forms import MicroBatchForms
from colt5dist.train.engine.micro_batch_graph import MicroBatchGraphs, arrange, to_device, without_needless_mask
from colt5dist.train.engine.sharded_gradients import ShardedGradients
from colt5dist.train.engine.whole_model import whole_copy
from colt5dist.train.losses import training_loss
from colt5dist.train.optimizer.groups import LR_FACTOR, build_optimizer
from colt5dist.train.optimizer.muon import Muon
from colt5dist.train.optimizer.weight_average import WeightAverage
from colt5dist.train.ranks import ranks_from_environment


class Engine:
    """A CoLT5, or CausalCoLT5, under DeepSpeed.

    The order of calls in a step: `forward_backward` for each micro-batch, `gradients.summary` and
    `gradients.are_finite` (the ranks' agreement), perhaps `gradients.refuse`, then `step` once.

    Args:
        config: the run.
        world_size: number of processes.
        device: device of this rank.
        flat_gradients: whether ZeRO stages 1-3 sum gradients by `FlatGradients` and `ShardedGradients`, not by
            DeepSpeed's hooks; None: on GPUs, unless the optimizer is offloaded.
    """

    def __init__(
        self, config: RunConfig, world_size: int, device: torch.device, *, flat_gradients: bool | None = None
    ) -> None:
        import deepspeed
        from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS

        if Muon not in ZERO_SUPPORTED_OPTIMIZERS:
            ZERO_SUPPORTED_OPTIMIZERS.append(Muon)  # tests hold it to a reference at every stage
        on_gpu = device.type == "cuda"
        self.device = device
        self.stage = engine_stage(config, on_gpu)
        self.dtype = torch.bfloat16 if uses_bf16(config, on_gpu) else torch.float32
        self.z_loss = config.train.z_loss
        settings = deepspeed_config(config, world_size, on_gpu)
        if flat_gradients is None:
            flat_gradients = sums_flat(config, on_gpu)
        if on_gpu:
            use_cache()
        if on_gpu and flat_gradients:
            # CUDA graphs cannot be captured on the default stream; and autograd adds the gradient of a parameter on the
            # stream that was current when DeepSpeed first looked at it, so that one stream has to serve throughout
            torch.cuda.set_stream(torch.cuda.Stream(device))
        torch.manual_seed(config.seed)
        if self.stage == 3:
            with deepspeed.zero.Init(config_dict_or_path=settings):
                model = build_model(config)
        else:
            model = build_model(config)
        compiled = on_gpu and flat_gradients and config.train.compile != "off" and not config.train.deterministic
        self.forms = MicroBatchForms(model, device, compiled=compiled)
        """Which code runs a micro-batch."""
        self.deepspeed, *_ = deepspeed.initialize(
            model=model, optimizer=build_optimizer(model, config.optimizer), config=settings
        )
        place_matrices(self)
        self.average = WeightAverage(flat_weights(self), config.train.ema) if config.train.ema else None
        """The moving average of the weights (`train.ema`), if there is one."""
        self._num_micro_batches = config.gradient_accumulation_steps(world_size)
        self._micro_batch = 0
        self._has_room = torch.ones(1, device=device)
        """By which ranks agree in `writer`, taken while there is memory."""
        if on_gpu and not compiled and config.train.compile != "off" and self.deepspeed.global_rank == 0:
            self.forms.news.append(
                "note: train.compile: layers are not compiled; it serves runs without zero.offload and without "
                "train.deterministic"
            )
        self.gradients = self._choose_gradients(config, flat_gradients)
        if isinstance(self.gradients, GradientSums) and self.gradients.note:
            self.forms.news.append(self.gradients.note)
        if compiled:
            assert isinstance(self.gradients, GradientSums)
            self.forms.begin(self._pass, self.gradients, graphs=config.train.compile == "auto")

    def _choose_gradients(self, config: RunConfig, flat: bool) -> GradientSums | DeepSpeedGradients:
        """What sums, judges and applies the gradients."""
        clipping = config.optimizer.gradient_clipping
        if not flat:
            return DeepSpeedGradients(self.deepspeed, self.stage, clipping=clipping, device=self.device)
        reduce_dtype = self.dtype if config.zero.reduce_dtype == "bf16" else torch.float32
        if self.stage == 3:
            ranks = ranks_from_environment()
            return ShardedGradients(
                self.deepspeed,
                LAYERS,
                clipping=clipping,
                reduce_dtype=reduce_dtype,
                one_host=ranks.local_world_size == ranks.world_size,
            )
        return FlatGradients(
            self.deepspeed,
            self.stage,
            clipping=clipping,
            reduce_dtype=reduce_dtype,
            bucket_size=config.zero.bucket_size,
        )

    def _pass(self, batch: Batch, num_targets: torch.Tensor) -> CoLT5Output:
        """Forward and backward of a micro-batch that is on the device."""
        output = self.forward(batch)
        training_loss(output, num_targets, self.z_loss).backward()
        assert isinstance(self.gradients, GradientSums)
        self.gradients.after_backward()
        return CoLT5Output(output.token_loss.detach(), output.z_loss.detach(), ())

    def arrange(self, micro_batches: list[Batch]) -> list[Batch]:
        """A step's micro-batches with their rows in the order in which they run fastest."""
        return micro_batches if self.forms.graphs is None else arrange(micro_batches)

    def change_lengths(self, stage: RunConfig) -> None:
        """Go on with the micro-batches and the share of routed tokens of another stage of the run."""
        world_size = self.deepspeed.world_size
        self._num_micro_batches = stage.gradient_accumulation_steps(world_size)
        # DeepSpeed steps when the micro-batches that it has counted are a multiple of the accumulation steps
        self.deepspeed.micro_steps = 0
        self.deepspeed.set_train_micro_batch_size(stage.micro_batch_size(world_size))
        self.deepspeed.set_train_batch_size(stage.train.global_batch_size)
        if hasattr(self.deepspeed.optimizer, "gradient_accumulation_steps"):
            self.deepspeed.optimizer.gradient_accumulation_steps = self._num_micro_batches
        model_config: Any = self.module.config
        self.forms.forget()
        model_config.num_heavy_tokens = stage.model.num_heavy_tokens

    @property
    def module(self) -> nn.Module:
        """The model; at stage 3 its parameters are empty outside of forward and backward."""
        return self.deepspeed.module

    @property
    def torch_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer that DeepSpeed wraps; at stages 1-3 it steps on flat float32 partitions."""
        optimizer = self.deepspeed.optimizer
        return optimizer.optimizer if self.stage else optimizer

    def forward_backward(
        self,
        batch: Batch,
        num_targets: torch.Tensor,
        *,
        collect_routing: bool = False,
        timed: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> tuple[Batch, CoLT5Output]:
        """Run one micro-batch forward and backward, and add its gradient.

        Args:
            batch: the micro-batch, on the host.
            num_targets: valid target tokens of the global batch, a float32 scalar on the device.
            collect_routing: whether the output says what the routers did.
            timed: makes a context for the part of the work that waits for no other rank.

        Returns:
            The micro-batch on the device, and the model's output; both may be overwritten by the next call.
        """
        self.forms.prove(batch, num_targets)
        if self.forms.graphs is not None:
            return self._replay(self.forms.graphs, batch, num_targets, collect_routing, timed)
        on_device = to_device(batch, self.device)
        compiled = self.forms.compiled and not collect_routing
        given = on_device if collect_routing or self.device.type == "cpu" else without_needless_mask(on_device, batch)
        # around the backward pass, too, in which activation checkpointing runs the layers again
        with self.forms.code(compiled=compiled):
            with timed(), record_function("forward"):
                output = self.forward(given, collect_routing=collect_routing)
                loss = training_loss(output, num_targets, self.z_loss)
            with record_function("backward"):
                self.backward(loss)
        return on_device, output

    def _replay(
        self,
        graphs: MicroBatchGraphs,
        batch: Batch,
        num_targets: torch.Tensor,
        collect_routing: bool,
        timed: Callable[[], AbstractContextManager[None]],
    ) -> tuple[Batch, CoLT5Output]:
        """`forward_backward` by CUDA graph."""
        with timed(), record_function("forward and backward"):
            on_device, output = graphs.run(batch, num_targets)
        assert isinstance(self.gradients, GradientSums)
        self.gradients.after_micro_batch()
        self._micro_batch += 1
        if collect_routing:
            with torch.no_grad():
                output = output._replace(routing=self.forward(on_device, collect_routing=True).routing)
        return on_device, output

    def close(self) -> None:
        """Give up the CUDA graphs; at stage 3 they use the ranks' communicator, which cannot end before them."""
        self.forms.graphs = None
        if self.device.type == "cuda":  # elsewhere there are none to look for among a million objects
            gc.collect()

    @contextmanager
    def plain(self) -> Iterator[None]:
        """Within it, and after it, nothing is captured or compiled: for looking into what went wrong."""
        self.forms.leave()
        with self.forms.code(compiled=False):
            yield

    def forward(self, batch: Batch, *, collect_routing: bool = False) -> CoLT5Output:
        """Token losses of one micro-batch that is on the device."""
        module = self.module if isinstance(self.gradients, GradientSums) else self.deepspeed
        compiled = self.forms.compiled and torch.is_grad_enabled() and not collect_routing
        with self.forms.code(compiled=compiled):
            return self._call(module, batch, collect_routing)

    @contextmanager
    def writer(self, *, wanted: bool = True) -> Iterator[CoLT5 | CausalCoLT5 | None]:
        """Give the model as it is now, for its `generate`, which needs no other rank; None where it is not wanted.

        At stage 3 it is a copy with whole weights, which takes their memory meanwhile, and this call is collective; it
        raises a NoRoomError on all ranks where some rank has no room.
        """
        is_copied = self.stage == 3
        module = None if is_copied or not wanted else self.module
        try:
            if is_copied:
                self._free_memory()  # so that what is free shows
                module = whole_copy(self.module, self.device, self._has_room, wanted=wanted)
            with self.forms.code(compiled=False):
                yield cast(CoLT5 | None, module)
        finally:
            if is_copied and module is not None:
                module.to_empty(device="meta")  # whoever still refers to the copy
            if is_copied:
                self._free_memory()

    def _free_memory(self) -> None:
        """Give back the memory that PyTorch keeps for later, which NCCL and CUDA's libraries cannot use."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _call(self, module: nn.Module, batch: Batch, collect_routing: bool) -> CoLT5Output:
        return module(
            batch["input_ids"],
            batch["decoder_input_ids"],
            batch["target_ids"],
            input_mask=batch["input_mask"],
            target_mask=batch["target_mask"],
            sample_index=batch["sample_index"],
            collect_routing=collect_routing,
        )

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradient of this rank's share of the global loss to those of its other micro-batches."""
        self.gradients.backward(loss)
        self._micro_batch += 1

    def step(self, learning_rate: float) -> tuple[bool, float]:
        """Clip and apply the gradients, or drop them if they are not finite.

        Returns:
            Whether the step was applied, and the global gradient norm before clipping; NaN if it was not.
        """
        assert self._micro_batch == self._num_micro_batches
        self._micro_batch = 0
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = learning_rate * group.get(LR_FACTOR, 1.0)
        applied, norm = self.gradients.step()
        if applied and self.average is not None:
            self.average.update()
        return applied, norm if applied else math.nan

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Within it the model has the averaged weights (`train.ema`), for evaluation; afterwards its own, to the bit.

        Collective.
        """
        self._swap_average()
        try:
            yield
        finally:
            self._swap_average()

    def _swap_average(self) -> None:
        assert self.average is not None
        self.average.swap()
        refresh_parameters(self)

    def train(self, mode: bool) -> None:
        """Switch between training and evaluation."""
        self.deepspeed.train(mode)


def build_model(config: RunConfig) -> nn.Module:
    """The model of a configuration, freshly initialised."""
    kind = CausalCoLT5 if config.model.architecture == "causal" else CoLT5
    # a copy: its share of routed tokens may change with the lengths
    return kind(replace(config.model), activation_checkpointing=config.train.activation_checkpointing, seed=config.seed)


def parameter_shapes(config: RunConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter, without memory for any."""
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in build_model(config).named_parameters()}


def num_elements(shape: tuple[int, ...]) -> int:
    """Elements of a tensor of a shape."""
    return math.prod(shape)


def device_problems(config: RunConfig, world_size: int, cuda_devices: int, local_world_size: int) -> list[str]:
    """What is wrong with the configuration on the devices that are there, one line each."""
    found = config.batch_problems(world_size)
    if not found:
        found += library_problems(config, world_size, cuda_devices > 0)
    if config.optimizer.name == "adafactor" and uses_bf16(config, cuda_devices > 0):
        found.append(
            "optimizer.name: adafactor needs fp32 parameters; set train.precision=fp32 or optimizer.name=adamw"
        )
    if config.model.router_implementation == "triton" and not cuda_devices:
        found.append("model.router_implementation: triton needs a GPU; use auto")
    if cuda_devices and local_world_size > cuda_devices:
        found.append(
            f"this host has {cuda_devices} GPUs for {local_world_size} processes; start {cuda_devices} with "
            f"--num_gpus {cuda_devices}, or set CUDA_VISIBLE_DEVICES= to run on CPUs (with srun: give the GPUs to the "
            "host, --gpus-per-node, not to the tasks)"
        )
    return found
