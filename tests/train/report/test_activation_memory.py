"""What a forward pass keeps, counted on shapes alone, beside what a real one keeps."""

from pathlib import Path

import pytest
import torch

from colt5dist.train.config.load import load_config
from colt5dist.train.engine.engine import build_model
from colt5dist.train.report.activation_memory import activation_bytes, kept_bytes, logits_bytes

TINY = Path(__file__).resolve().parents[3] / "configs" / "tiny.yaml"
SHORT = ["data.input_length=256", "data.target_length=64", "model.num_encoder_layers=3", "model.light_radius=32"]


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_it_counts_what_a_real_pass_keeps(checkpointing: str) -> None:
    config = load_config(TINY, [*SHORT, f"train.activation_checkpointing={checkpointing}"])
    model = build_model(config)
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage
        return tensor

    ids, targets = torch.randint(3, 250, (2, 256)), torch.randint(3, 250, (2, 64))
    masks = torch.ones_like(ids, dtype=torch.bool), torch.ones_like(targets, dtype=torch.bool)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(
            ids, targets, targets, input_mask=masks[0], target_mask=masks[1], sample_index=torch.zeros(2).long()
        )
    real = sum(storage.nbytes() for storage in kept.values())
    del output
    assert activation_bytes(config, 2, on_gpu=False) == pytest.approx(real, rel=0.02)


def test_a_gpu_keeps_less_but_the_logits() -> None:
    config = load_config(TINY, [*SHORT, "train.precision=fp32"])
    on_gpu, on_cpu = kept_bytes(config, 1, on_gpu=True), kept_bytes(config, 1, on_gpu=False)
    assert on_gpu.encoder_layer < on_cpu.encoder_layer and on_gpu.decoder_layer < on_cpu.decoder_layer
    assert logits_bytes(config, 1) == 4 * 64 * config.model.vocab_size
    assert on_gpu.outside > logits_bytes(config, 1)
    assert on_gpu.of_samples(config, 4) == pytest.approx(activation_bytes(config, 4, on_gpu=True), rel=0.01)


def test_too_many_logits_are_not_kept() -> None:
    config = load_config(TINY, ["train.precision=bf16"])
    most = 2**30 // (config.data.target_length * config.model.vocab_size)
    assert logits_bytes(config, most) == 2 * most * config.data.target_length * config.model.vocab_size
    assert logits_bytes(config, most + 1) == 0
