"""Estimates the memory of a micro-batch's activations without a device, by a forward pass on shapes alone."""

from dataclasses import replace

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from colt5dist.train.config.schema import RunConfig
from colt5dist.train.engine.deepspeed_json import uses_bf16
from colt5dist.train.engine.engine import build_model


def activation_bytes(config: RunConfig, micro_batch_size: int, *, on_gpu: bool) -> int:
    """Bytes that one forward pass keeps for the backward pass; each storage counts once.

    This is an upper estimate: it counts with the CPU's operators, and those of a GPU keep less. With activation
    checkpointing, what one layer keeps while it is recomputed comes on top.

    Args:
        config: the run, or a stage of it.
        micro_batch_size: samples that a device holds at once.
        on_gpu: whether the device is a GPU, which decides the precision `auto`.

    Returns:
        Number of bytes.
    """
    model = config.model
    encoder, decoder = min(model.num_encoder_layers, 1), min(model.num_decoder_layers, 1)
    few = _forward_bytes(config, encoder, decoder, micro_batch_size, on_gpu)
    total = few
    # all layers of a kind keep the same: the difference between two and one is what each further layer keeps
    if model.num_encoder_layers > 1:
        more = _forward_bytes(config, 2, decoder, micro_batch_size, on_gpu)
        total += (model.num_encoder_layers - 1) * (more - few)
    if model.num_decoder_layers > 1:
        more = _forward_bytes(config, encoder, 2, micro_batch_size, on_gpu)
        total += (model.num_decoder_layers - 1) * (more - few)
    return total


def _forward_bytes(config: RunConfig, encoder: int, decoder: int, micro_batch_size: int, on_gpu: bool) -> int:
    """Bytes that the forward pass keeps in a model with the given numbers of encoder and decoder layers."""
    config = replace(config, model=replace(config.model, num_encoder_layers=encoder, num_decoder_layers=decoder))
    data = config.data
    dtype = torch.bfloat16 if uses_bf16(config, on_gpu) else torch.float32
    kept: dict[int, tuple[torch.Tensor, int]] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        # keep the tensor too: otherwise a later one could reuse the address of its storage
        kept[storage._cdata] = tensor, storage.nbytes()
        return tensor

    with FakeTensorMode():
        model = _build(config, dtype)
        ids = torch.zeros(micro_batch_size, data.input_length, dtype=torch.int64)
        targets = torch.zeros(micro_batch_size, data.target_length, dtype=torch.int64)
        parameters = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
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
