"""Estimates the memory of a micro-batch's activations without a device, by a forward pass on shapes alone."""

from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from local_attention import LocalAttention
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from colt5dist.model.vocabulary_loss import MAX_KEPT_LOGITS
from colt5dist.nn.norm import RMSNorm
from colt5dist.nn.routing.routing_tokens import RoutingTokens
from colt5dist.train.config.schema import RunConfig
from colt5dist.train.engine.deepspeed_json import uses_bf16
from colt5dist.train.engine.engine import build_model

FUSED_ON_GPUS = (RMSNorm, RoutingTokens, LocalAttention)
"""Modules for which a GPU has one kernel that keeps its inputs only; on a CPU several operators keep more. Causal local
attention has none."""


@dataclass(frozen=True)
class KeptBytes:
    """Bytes that a forward pass keeps for the backward pass."""

    encoder_layer: int
    """Of each layer of the encoder."""
    decoder_layer: int
    """Of each layer of the decoder."""
    outside: int
    """Of all that is outside of the layers, with the logits where they are kept."""
    total: int
    """Of the whole model."""

    def of_samples(self, config: RunConfig, number: int) -> int:
        """Bytes of the whole model for more samples, on a GPU, if these are those of one.

        All but the logits is proportional to the samples.
        """
        return number * (self.total - logits_bytes(config, 1)) + logits_bytes(config, number)


def activation_bytes(config: RunConfig, micro_batch_size: int, *, on_gpu: bool) -> int:
    """Bytes that one forward pass keeps for the backward pass; each storage counts once.

    With activation checkpointing, what one layer keeps while it is recomputed comes on top.

    Args:
        config: the run, or a stage of it.
        micro_batch_size: samples that a device holds at once.
        on_gpu: whether the device is a GPU, which decides the precision `auto` and which operators are fused.

    Returns:
        Number of bytes.
    """
    return kept_bytes(config, micro_batch_size, on_gpu=on_gpu).total


def kept_bytes(config: RunConfig, micro_batch_size: int, *, on_gpu: bool) -> KeptBytes:
    """The same, layer by layer: of layers that run one by one. Compiled ones keep less.

    Args:
        config: the run, or a stage of it.
        micro_batch_size: samples that a device holds at once.
        on_gpu: whether the device is a GPU.
    """
    model = config.model
    encoder, decoder = min(model.num_encoder_layers, 1), min(model.num_decoder_layers, 1)
    few = _forward_bytes(config, encoder, decoder, micro_batch_size, on_gpu)
    # all layers of a kind keep the same: the difference between two and one is what each further layer keeps
    of_encoder = _forward_bytes(config, 2, decoder, micro_batch_size, on_gpu) - few if encoder else 0
    of_decoder = _forward_bytes(config, encoder, 2, micro_batch_size, on_gpu) - few if decoder else 0
    outside = few - encoder * of_encoder - decoder * of_decoder
    if on_gpu:
        outside += logits_bytes(config, micro_batch_size)
    layers = model.num_encoder_layers * of_encoder + model.num_decoder_layers * of_decoder
    return KeptBytes(of_encoder, of_decoder, outside, outside + layers)


def logits_bytes(config: RunConfig, micro_batch_size: int) -> int:
    """Bytes of the logits of a micro-batch, which a GPU keeps unless they are too many (`VocabularyLoss`)."""
    logits = micro_batch_size * config.data.target_length * config.model.vocab_size
    return logits * (2 if uses_bf16(config, on_gpu=True) else 4) if logits <= MAX_KEPT_LOGITS else 0


def _forward_bytes(config: RunConfig, encoder: int, decoder: int, micro_batch_size: int, on_gpu: bool) -> int:
    """Bytes that the forward pass keeps in a model with the given numbers of encoder and decoder layers."""
    config = replace(config, model=replace(config.model, num_encoder_layers=encoder, num_decoder_layers=decoder))
    data = config.data
    dtype = torch.bfloat16 if uses_bf16(config, on_gpu) else torch.float32
    kept: dict[int, tuple[torch.Tensor, int]] = {}
    fused: list[tuple[torch.Tensor, ...]] = []
    """The inputs of the module that a GPU computes in one kernel, while the pass is in it."""

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        for used in fused[-1] if fused else (tensor,):
            storage = used.untyped_storage()
            # keep the tensor too: otherwise a later one could reuse the address of its storage
            kept[storage._cdata] = used, storage.nbytes()
        return tensor

    def is_fused(module: nn.Module) -> bool:
        return on_gpu and isinstance(module, FUSED_ON_GPUS) and not getattr(module, "causal", False)

    def enter(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if is_fused(module):
            fused.append(tuple(x for x in inputs if isinstance(x, torch.Tensor)))

    def leave(module: nn.Module, *_: Any) -> None:
        if is_fused(module):
            fused.pop()

    with FakeTensorMode(), ExitStack() as stack:
        model = _build(config, dtype)
        ids = torch.zeros(micro_batch_size, data.input_length, dtype=torch.int64)
        targets = torch.zeros(micro_batch_size, data.target_length, dtype=torch.int64)
        parameters = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        stack.callback(register_module_forward_pre_hook(enter).remove)
        stack.callback(register_module_forward_hook(leave).remove)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = model(
                ids,
                targets,
                targets,
                input_mask=torch.ones_like(ids, dtype=torch.bool),
                target_mask=torch.ones_like(targets, dtype=torch.bool),
                sample_index=torch.zeros(micro_batch_size, dtype=torch.int64),
            )
    del output
    return sum(size for number, (_, size) in kept.items() if number not in parameters)


def _build(config: RunConfig, dtype: torch.dtype) -> nn.Module:
    """Build the model with parameters of a dtype; parameters without memory cannot be converted later."""
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return build_model(config)
    finally:
        torch.set_default_dtype(usual)
