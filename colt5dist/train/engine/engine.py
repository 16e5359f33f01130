"""The DeepSpeed engine: model, optimizer and ZeRO behind the four calls that the loop makes."""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from colt5dist.data.read.batch import Batch
from colt5dist.model.causal_colt5 import CausalCoLT5
from colt5dist.model.colt5 import CoLT5, CoLT5Output
from colt5dist.train.config.schema import RunConfig
from colt5dist.train.engine.deepspeed_json import deepspeed_config, engine_stage, uses_bf16
from colt5dist.train.engine.optimizer import build_optimizer


class Engine:
    """A CoLT5, or CausalCoLT5, under DeepSpeed.

    The order of calls in a step: `forward` and `backward` for each micro-batch, then `step` once.

    Args:
        config: the run.
        world_size: number of processes.
        device: device of this rank.
    """

    def __init__(self, config: RunConfig, world_size: int, device: torch.device) -> None:
        import deepspeed

        on_gpu = device.type == "cuda"
        self.device = device
        self.stage = engine_stage(config, on_gpu)
        self.dtype = torch.bfloat16 if uses_bf16(config, on_gpu) else torch.float32
        self.clipping = config.optimizer.gradient_clipping
        settings = deepspeed_config(config, world_size, on_gpu)
        torch.manual_seed(config.seed)
        if self.stage == 3:
            with deepspeed.zero.Init(config_dict_or_path=settings):
                model = build_model(config)
        else:
            model = build_model(config)
        self.deepspeed, *_ = deepspeed.initialize(
            model=model, optimizer=build_optimizer(model, config.optimizer), config=settings
        )
        self._num_micro_batches = config.gradient_accumulation_steps(world_size)
        self._micro_batch = 0

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

    def forward(self, batch: Batch, *, collect_routing: bool = False) -> CoLT5Output:
        """Token losses of one micro-batch that lies on the device."""
        return self.deepspeed(
            batch["input_ids"],
            batch["decoder_input_ids"],
            batch["target_ids"],
            input_mask=batch["input_mask"],
            target_mask=batch["target_mask"],
            sample_index=batch["sample_index"],
            collect_routing=collect_routing,
        )

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradient of this rank's share of the global loss.

        The gradients of all micro-batches and ranks are summed: DeepSpeed's division by the accumulation steps is
        switched off and its mean over ranks undone.
        """
        if self._micro_batch:
            self.deepspeed.step()  # not at the boundary yet: only counts the micro-batch that came before
        self.deepspeed.backward(loss * self.deepspeed.world_size, scale_wrt_gas=False)
        self._micro_batch += 1

    def step(self, learning_rate: float) -> tuple[bool, float]:
        """Clip and apply the gradients, or drop them if they are not finite.

        Returns:
            Whether the step was applied, and the global gradient norm before clipping.
        """
        assert self._micro_batch == self._num_micro_batches
        self._micro_batch = 0
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = learning_rate
        finite, norm = self._clip_whole_gradients() if self.stage == 0 else (True, 0.0)
        self.deepspeed.step()
        if self.stage:
            norm = float(self.deepspeed.get_global_grad_norm())
            finite = self.deepspeed.was_step_applied()
        if not finite:
            self._drop_summed_gradients()
        return finite, norm

    def train(self, mode: bool) -> None:
        """Switch between training and evaluation."""
        self.deepspeed.train(mode)

    def _drop_summed_gradients(self) -> None:
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
        parameters = [p for p in self.module.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        value = float(norm)
        finite = value < float("inf")
        if not finite:
            for p in parameters:
                p.grad = None
        elif self.clipping > 0:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.clipping, norm)
        return finite, value


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
    if config.optimizer.name == "adafactor" and uses_bf16(config, cuda_devices > 0):
        found.append(
            "optimizer.name: adafactor needs fp32 parameters; set train.precision=fp32 or optimizer.name=adamw"
        )
    if config.model.router_implementation == "triton" and not cuda_devices:
        found.append("model.router_implementation: triton needs a GPU; use auto")
    if cuda_devices and local_world_size > cuda_devices:
        found.append(
            f"this host has {cuda_devices} GPUs for {local_world_size} processes; start {cuda_devices} with "
            f"--num_gpus {cuda_devices}, or set CUDA_VISIBLE_DEVICES= to run on CPUs"
        )
    return found


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Copy a batch to the device, without waiting where its memory is pinned."""
    tensors: dict[str, Any] = {**batch}
    moved: Any = {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}
    return moved
