"""The cost of a run by formula: tokens, FLOPs, memory; and the peak rates of devices."""

import math
import re
import resource
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise

import torch

from colt5dist.data.config import DataConfig
from colt5dist.model.config import CoLT5Config
from colt5dist.train.config.schema import RunConfig
from colt5dist.train.engine.deepspeed_json import sums_flat, uses_bf16
from colt5dist.wording import count

PEAK_BF16_FLOPS = {
    "B200": 2250e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "GH200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H800 PCIe": 756e12,
    "H800": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10": 125e12,
}
"""Dense bf16 FLOPs per second by a part of the device's name, from the vendor's data sheets; the first match counts."""


def tokens_of_run(config: RunConfig, per_sample: Callable[[DataConfig], float]) -> int:
    """Sum the tokens of all samples of a run, each with the lengths of its stage.

    Args:
        config: the run.
        per_sample: number of tokens of one sample, from the data configuration of a stage.

    Returns:
        Number of tokens.
    """
    bounds = [*config.stage_starts, config.train.steps + 1]
    steps = [max(0, min(stop, config.train.steps + 1) - first) for first, stop in pairwise(bounds)]
    stages = zip(config.stages, steps, strict=True)
    return round(config.train.global_batch_size * sum(per_sample(stage.data) * number for stage, number in stages))


def forward_multiply_adds(model: CoLT5Config, input_length: int, target_length: int) -> int:
    """Multiply-adds of one sample's forward pass: light branches on all tokens, heavy branches on the routed tokens.

    Only matrix products are counted (CoLT5, arXiv 2303.09752, tables 1 and 2, with gated feed-forward layers and the
    output embedding); the routing itself is left out. Local attention counts with its 2 * radius + 1 keys, causal
    self-attention with all keys. In the causal architecture, light attention counts with the keys of two windows,
    routed parts with their budgets, and heavy attention with a full memory.

    Args:
        model: sizes of the model.
        input_length: tokens of the encoder input.
        target_length: tokens of the decoder target.

    Returns:
        Number of multiply-adds.
    """
    n, t, d, dh = input_length, target_length, model.d_model, model.head_dim
    head = t * d * model.vocab_size
    light, heavy = model.num_light_heads * dh, model.num_heavy_heads * dh
    if model.architecture == "causal":
        num_ff, num_q, num_kv = (t * share // model.window_size for share in model.num_routed(model.window_size))
        light_attention = 4 * t * d * light + 2 * t * min(2 * model.window_size, t) * light
        seen = min(model.memory_size, num_kv)
        heavy_attention = 2 * num_q * d * heavy + 2 * num_kv * d * heavy + 2 * num_q * seen * heavy
        feed_forward = 3 * d * (t * model.light_ff_dim + num_ff * model.heavy_ff_dim)
        return model.num_decoder_layers * (light_attention + heavy_attention + feed_forward) + head
    if model.encoder == "dense":
        width = model.num_heads * dh
        encoder_layer = 4 * n * d * width + 2 * n * n * width + 3 * n * d * model.ff_dim
    else:
        num_ff, num_q, num_kv = model.num_routed(n)  # none with encoder=light
        light_attention = 4 * n * d * light + 2 * n * min(2 * model.light_radius + 1, n) * light
        heavy_attention = 2 * num_q * d * heavy + 2 * num_kv * d * heavy + 2 * num_q * num_kv * heavy
        feed_forward = 3 * d * (n * model.light_ff_dim + num_ff * model.heavy_ff_dim)
        encoder_layer = light_attention + heavy_attention + feed_forward
    width = model.num_heads * dh
    self_attention = 4 * t * d * width + 2 * t * t * width
    cross_attention = 2 * t * d * width + 2 * n * d * dh + 2 * t * n * width
    decoder_layer = self_attention + cross_attention + 3 * t * d * model.ff_dim
    return model.num_encoder_layers * encoder_layer + model.num_decoder_layers * decoder_layer + head


def step_flops(config: RunConfig) -> int:
    """Floating-point operations of an optimizer step: two per multiply-add, and the backward pass as two forwards.

    What activation checkpointing recomputes is not counted.

    Args:
        config: the run, or a stage of it.
    """
    forward = forward_multiply_adds(config.model, config.data.input_length, config.data.target_length)
    return 6 * forward * config.train.global_batch_size


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 peak of one device in floating-point operations per second; None if it is not known."""
    return peak_flops_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def peak_flops_of(name: str) -> float | None:
    """The same by the name of the device; None also for a part of a GPU (MIG), whose share of the peak is unknown."""
    if re.search(r"\bMIG\b", name):
        return None
    return next((peak for part, peak in PEAK_BF16_FLOPS.items() if re.search(rf"\b{part}\b", name)), None)


def peak_memory_bytes(device: torch.device) -> int:
    """Largest memory that this process has used so far: of the GPU, or resident on the host.

    On a GPU it is what PyTorch has reserved: the memory of CUDA graphs counts as allocated only while they are made.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def describe_batch(config: RunConfig, world_size: int) -> str:
    """How the global batch is divided, as text: "2 devices x 1 micro-batch x 4"."""
    accumulation = config.gradient_accumulation_steps(world_size)
    micro_batches = count(accumulation, "micro-batch", "micro-batches")
    return f"{count(world_size, 'device')} x {micro_batches} x {config.micro_batch_size(world_size)}"


@dataclass(frozen=True)
class StateMemory:
    """Bytes per device for the model states: parameters, gradients, float32 copies and moments (no activations)."""

    stage: int
    """ZeRO stage."""
    device_bytes: int
    """Bytes per device."""
    gradient_bytes: int
    """Of these, the bytes of gradients and their sums."""


def gathered_elements(shapes: Mapping[str, tuple[int, ...]], most: int = 0) -> int:
    """Elements that a device holds whole at once at ZeRO stage 3: of two layers, or more, and of no layer at all.

    Args:
        shapes: name and shape of every parameter.
        most: elements up to which layers stay gathered until their backward pass (`max_live_parameters`); the two
            largest layers are there at least.
    """
    layers: Counter[str] = Counter()
    outside = 0
    for name, shape in shapes.items():
        layer = re.match(r".*\blayers\.\d+\.", name)
        if layer is None:
            outside += math.prod(shape)
        else:
            layers[layer.group()] += math.prod(shape)
    two = sum(elements for _, elements in layers.most_common(2))
    return outside + max(two, min(layers.total(), most - outside))


def state_memory(
    config: RunConfig,
    num_parameters: int,
    world_size: int,
    on_gpu: bool,
    *,
    num_gathered: int = 0,
    num_moments: int | None = None,
) -> list[StateMemory]:
    """Memory of the model states per device at each ZeRO stage, without offload and communication buckets.

    Bytes per parameter in bf16: weights 2; float32 copy 4 and AdamW's moments 8; gradients where we sum them (on GPUs
    without offload) 4 for the float32 sums, and at stage 2 on several devices 2 for one micro-batch's whole gradient;
    where DeepSpeed does 2 when computed and 4 summed. In fp32: weights 4, gradients 4 (and 4 for stage 2's whole
    gradient), moments 8, and from stage 1 on a copy of the device's own share, 4. An average of the weights
    (`train.ema`) takes 4, shared out as moments are. Muon's matrices have moments of 4.

    Args:
        config: the run.
        num_parameters: number of parameters of the model.
        world_size: number of devices.
        on_gpu: whether the devices are GPUs, which decides the precision `auto`.
        num_gathered: parameters that stage 3 holds whole at once (`gathered_elements`).
        num_moments: float32 numbers that the optimizer keeps besides the weights (`num_moments` in
            colt5dist/train/optimizer/groups.py); None: two a parameter.

    Returns:
        One entry per ZeRO stage, 0 to 3.
    """
    w = world_size
    bf16 = uses_bf16(config, on_gpu)
    whole = 2 if bf16 else 4
    kept = 2 * num_parameters if num_moments is None else num_moments
    kept += 0 if config.train.ema is None else num_parameters
    rows = []
    for stage in (0, 1, 2, 3):
        flat = sums_flat(replace(config, zero=replace(config.zero, stage=stage)), on_gpu)
        gradients: float
        if flat:
            gradients = 4 if stage < 2 else 4 / w
            gradients += whole if stage == 2 and w > 1 else 0
        else:
            gradients = (6 if bf16 else 4) / (w if stage >= 2 else 1)
        # in bf16 stage 0 runs as stage 1
        states = 4 * (num_parameters + kept) / w if bf16 or stage else 4 * kept
        weights = whole / (w if stage == 3 else 1)
        gathered = whole * num_gathered if flat and stage == 3 and w > 1 else 0
        total = num_parameters * (weights + gradients) + states + gathered
        rows.append(StateMemory(stage, round(total), round(num_parameters * gradients)))
    return rows
