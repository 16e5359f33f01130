"""The FLOPs formula against PyTorch's own count, and the memory of the model states."""

from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from colt5dist.train.config.load import load_config
from colt5dist.train.engine.engine import build_model
from colt5dist.train.report.accounting import forward_multiply_adds, state_memory, step_flops

CONFIGS = Path(__file__).resolve().parents[3] / "configs"


@pytest.mark.parametrize("encoder", ["conditional", "dense"])
def test_formula_counts_what_pytorch_counts(encoder: str) -> None:
    """The formula counts local attention with 2 * radius + 1 keys; the package computes 3 blocks of `radius` keys."""
    config = load_config(CONFIGS / "tiny.yaml", [f"model.encoder={encoder}", "model.light_radius=64"])
    model = build_model(config)
    n, t = config.data.input_length, config.data.target_length
    ids, targets = torch.randint(3, 250, (1, n)), torch.randint(3, 250, (1, t))
    # the counter knows plain attention, but not the CPU's fused kernel
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(ids, targets, targets, sample_index=torch.zeros(1, dtype=torch.int64))
    counted = counter.get_total_flops() / 2
    if encoder == "conditional":
        width = config.model.num_light_heads * config.model.head_dim
        blocks = -(-n // 64) * 64 * 3 * 64
        counted += config.model.num_encoder_layers * 2 * width * (n * (2 * 64 + 1) - blocks)
    assert forward_multiply_adds(config.model, n, t) == pytest.approx(counted, rel=0.01)


def test_a_step_is_three_forwards_of_the_global_batch() -> None:
    config = load_config(CONFIGS / "tiny.yaml", [])
    forward = forward_multiply_adds(config.model, config.data.input_length, config.data.target_length)
    assert step_flops(config) == 2 * 3 * forward * config.train.global_batch_size


def test_memory_falls_with_the_stage_and_the_devices() -> None:
    config = load_config(CONFIGS / "base.yaml", [])
    eight = [row.device_bytes for row in state_memory(config, 1_000_000, 8, on_gpu=True)]
    assert eight == [9_500_000, 9_500_000, 4_250_000, 2_500_000]
    one = [row.device_bytes for row in state_memory(config, 1_000_000, 1, on_gpu=True)]
    assert one == [20_000_000] * 4
    cpu = [row.device_bytes for row in state_memory(config, 1_000_000, 2, on_gpu=False)]
    assert cpu == [16_000_000, 14_000_000, 12_000_000, 10_000_000]
